"""A server of the bundled model on a free port, in this process, and clients for it."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("openai")

import openai
import uvicorn

from loopserve import Engine
from loopserve.serve.app import create_app
from loopserve.serve.settings import ServerSettings

FACT = {"role": "user", "content": "the code of lisbon is amber falcon river ."}
QUESTION = {"role": "user", "content": "what is the code of lisbon ?"}


class Running:
    """A server that runs in a thread."""

    def __init__(self, engine: Engine, settings: ServerSettings, stacks: dict[str, Any] | None = None) -> None:
        self.app = create_app(engine, settings, stacks)
        self.server = self.app.state.server
        self.conversations = self.server.conversations
        config = uvicorn.Config(self.app, port=0, log_level="error", access_log=False, timeout_graceful_shutdown=5)
        self._uvicorn = uvicorn.Server(config)
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._clients: dict[str, openai.OpenAI] = {}

    def _run(self) -> None:
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        self.loop = asyncio.get_running_loop()
        await self._uvicorn.serve([self._socket])

    def start(self) -> None:
        self._thread.start()
        until(lambda: self._uvicorn.started)

    def stop(self) -> None:
        for client in self._clients.values():
            client.close()
        self._uvicorn.should_exit = True
        self._thread.join()
        self._socket.close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self, key: str = "none") -> openai.OpenAI:
        """The client of a key; making one takes longer than many requests."""
        if key not in self._clients:
            self._clients[key] = openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0)
        return self._clients[key]

    @contextmanager
    def connection(self, path: str, body: object, headers: dict[str, str] | None = None) -> Iterator[socket.socket]:
        """A raw connection on which a request was sent; nothing is read yet."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        head = {"Host": "127.0.0.1", "Content-Type": "application/json", "Content-Length": str(len(data))} | (
            headers or {}
        )
        lines = "".join(f"{name}: {value}\r\n" for name, value in head.items())
        with socket.create_connection(("127.0.0.1", self.port)) as connection:
            connection.sendall(f"POST {path} HTTP/1.1\r\n{lines}\r\n".encode() + data)
            yield connection


def until(condition: Callable[[], object], limit_s: float = 60.0) -> None:
    """Wait for a condition. The limit ends a test that hangs; no test depends on it otherwise."""
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, "a condition did not come true"
        time.sleep(0.005)


@pytest.fixture(scope="session")
def engine() -> Engine:
    return Engine.from_pretrained("demo", on_policy_fault="dense", dtype="float32")


@pytest.fixture
def serve(engine: Engine) -> Iterator[Callable[..., Running]]:
    """Starts servers with other settings; they end with the test."""
    running: list[Running] = []

    def start(stacks: dict[str, Any] | None = None, **settings: Any) -> Running:
        server = Running(engine, ServerSettings("demo", **settings), stacks)
        server.start()
        running.append(server)
        return server

    yield start
    for server in running:
        server.stop()


@pytest.fixture
def server(serve: Callable[..., Running]) -> Running:
    return serve()
