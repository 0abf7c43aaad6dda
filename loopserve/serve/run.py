"""Run the server in this process until a signal ends it."""

from __future__ import annotations

import asyncio
import gc
import logging
import socket
import sys
from collections.abc import Callable, Mapping

import uvicorn

from loopserve.api import Engine
from loopserve.core.stack.stack import PolicyStack
from loopserve.serve.app import create_app
from loopserve.serve.settings import ServerSettings
from loopserve.serve.supervising import BROKEN

_LOOK_EVERY_S = 0.5


class _Server(uvicorn.Server):
    """Refuse new requests from the first signal on, and let running answers end within the timeout."""

    def handle_exit(self, sig: int, frame: object) -> None:
        self.config.app.state.server.draining = True  # type: ignore[union-attr]
        super().handle_exit(sig, frame)  # type: ignore[arg-type]
        self._captured_signals.clear()  # else uvicorn raises the signal again, and a clean end would not exit with 0


def run_server(
    engine: Engine,
    settings: ServerSettings,
    stacks: Mapping[str, PolicyStack],
    listener: socket.socket,
    ready: Callable[[], None] = lambda: None,
) -> int:
    """Serve until SIGTERM or Ctrl-C; return the exit status, BROKEN if the device failed for good.

    Prints one line and calls ``ready`` once requests are taken. listener: see ``listening``.

    Raises ConfigError for settings that are refused.
    """
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr)
    app = create_app(engine, settings, stacks)
    gc.collect()
    gc.freeze()  # a full collection would look at every object of torch, which stops all threads for some 100 ms
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=max(1, round(settings.shutdown_timeout_s)),
        timeout_keep_alive=30,
        h11_max_incomplete_event_size=64 << 10,
    )
    server = _Server(config)
    asyncio.run(_serve(server, listener, settings, engine.stack.name, ready))
    return BROKEN if app.state.server.conversations.worker.beyond_repair else 0


async def _serve(
    server: uvicorn.Server, listener: socket.socket, settings: ServerSettings, stack: str, ready: Callable[[], None]
) -> None:
    running = asyncio.ensure_future(server.serve([listener]))
    while not server.started and not running.done():
        await asyncio.sleep(0.01)
    if not running.done():
        host, port = listener.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        print(f"serving {settings.model_name} under the stack {stack} at http://{shown}:{port} (API: /v1)", flush=True)
        ready()
    worker = server.config.app.state.server.conversations.worker  # type: ignore[union-attr]
    while not running.done():
        await asyncio.wait({running}, timeout=_LOOK_EVERY_S)
        if worker.beyond_repair and not server.should_exit:
            print("error: the device does not work any more; the server ends", file=sys.stderr, flush=True)
            server.should_exit = True
    await running
