"""Serve one model by several replicas on Ray Serve, each conversation where its pairs are in memory (docs/ray.md).

A gateway without the model reads each request and finds its conversation; Ray's consistent hashing chooses the replica; each replica
runs the app of ``create_app``. Ray moves requests and answers between processes by pickle: its ports must be closed to others.
"""

from __future__ import annotations

import asyncio
import re
import sqlite3
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, suppress
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import Request
from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from ray import serve
from ray.exceptions import RayError
from ray.serve.config import BackpressureConfig, RequestRouterConfig
from ray.serve.exceptions import BackPressureError, RayServeException
from starlette.responses import JSONResponse, Response, StreamingResponse

from loopserve.core.errors import ConfigError, LoopServeError
from loopserve.serve.body import parse_body, read_bytes
from loopserve.serve.errors import RETRY_AFTER_S, ApiError, as_api_error, overloaded
from loopserve.serve.routing import REQUESTS, messages_in, routing_key
from loopserve.serve.sealing import Sealer, read_key
from loopserve.serve.security import Security
from loopserve.serve.settings import ServerSettings, read_keys
from loopserve.serve.store import Store

_ROUTER = "ray.serve.experimental.consistent_hash_router:ConsistentHashRouter"
_GATEWAY_REQUESTS = 1000  # that one gateway passes on at once; each is little more than a task
_UNDER_WAY = re.compile("/v1/responses/[^/]+/cancel")  # what only the replica that answers knows of
_SCOPE = [
    "type",
    "asgi",
    "http_version",
    "method",
    "scheme",
    "path",
    "raw_path",
    "query_string",
    "root_path",
    "headers",
]


def _absolute(path: Path) -> Path:
    if not path.is_absolute():
        raise ValueError("give an absolute path: Ray starts the replicas in folders of its own")
    return path


AbsolutePath = Annotated[Path, AfterValidator(_absolute)]


class RaySettings(BaseModel):
    """Hold the settings of an application, as ``args`` of a Serve configuration give them. Those of a server have its defaults.

    Keys are given as files only: Ray shows the arguments of an application to everybody who may ask the cluster.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    model: str
    stack: str = "loopserve"
    allow_stack: tuple[str, ...] = ()
    served_model_name: str | None = None
    session_dir: AbsolutePath  # on a disk of the machine that all replicas share
    session_key_file: AbsolutePath | None = None
    session_ttl_s: float | None = 24 * 3600.0
    session_disk: int | None = Field(None, ge=0)  # bytes that caches may take there
    session_disk_per_key: int | None = Field(None, ge=0)
    api_key_file: AbsolutePath | None = None
    insecure: bool = False  # answer everybody who reaches Ray's proxy
    kv_cache_memory: int = Field(4 << 30, ge=1)  # bytes, of each replica
    max_num_seqs: int = Field(16, ge=1)  # of each replica
    max_num_batched_tokens: int = Field(512, ge=1)
    max_pass_steps: float | None = Field(2.0, gt=0)  # null: any time
    max_queued: int = Field(16, ge=0)  # at each replica; after that a conversation is answered by another one
    max_requests_per_key: int | None = Field(None, ge=1)  # at each replica
    max_queued_at_gateway: int = Field(64, ge=1)  # requests that no replica takes yet; more are answered 503
    shutdown_timeout_s: float = Field(30.0, ge=0)
    num_replicas: int = Field(2, ge=1)
    num_cpus: float = Field(1.0, ge=0)  # of each replica; torch takes as many threads
    num_gpus: float = Field(0.0, ge=0)
    dtype: str = "auto"
    device: str = "auto"
    weights: Literal["auto", "int8", "int4"] = "auto"

    def server(self) -> ServerSettings:
        """Return the settings of one replica's server. Raises ConfigError for a key file that cannot be read."""
        shared = [each.name for each in fields(ServerSettings) if each.name in type(self).model_fields]
        return ServerSettings(
            model_name=self.served_model_name or self.model,
            api_keys=() if self.api_key_file is None else read_keys(self.api_key_file),
            session_key=None if self.session_key_file is None else read_key(self.session_key_file),
            **{name: getattr(self, name) for name in shared},
        )


class Replica:
    """Answer requests by one engine: the app of ``create_app``, spoken to by ASGI messages."""

    def __init__(self, settings: RaySettings) -> None:
        from loopserve.api import Engine, load_stack
        from loopserve.models.quiet import quiet_libraries
        from loopserve.serve.app import create_app

        others = {each.name: each for each in map(load_stack, settings.allow_stack)}
        with quiet_libraries():
            engine = Engine.from_pretrained(
                settings.model,
                settings.stack,
                dtype=settings.dtype,
                device=settings.device,
                weights=settings.weights,
                on_policy_fault="dense",
            )
        self._app = create_app(engine, settings.server(), others)
        self._life: AbstractAsyncContextManager[Any] | None = None
        self._starting = asyncio.Lock()
        self._answering: set[asyncio.Task[None]] = set()

    async def check_health(self) -> None:
        """Raise RuntimeError if the engine fails again and again: Ray starts another replica in its place."""
        await self._start()
        if not self._app.state.server.conversations.worker.healthy:
            raise RuntimeError("the engine does not recover")

    async def answer(self, scope: dict[str, Any], body: bytes) -> AsyncIterator[dict[str, Any]]:
        """Yield the ASGI messages of the response to a request. A caller that stops iterating is a client that left."""
        await self._start()
        messages: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        unread, gone = [{"type": "http.request", "body": body, "more_body": False}], asyncio.Event()
        name = serve.get_replica_context().replica_id.unique_id.encode()

        async def receive() -> dict[str, Any]:
            if unread:
                return unread.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                message = message | {"headers": [*message["headers"], (b"x-loopserve-replica", name)]}
            messages.put_nowait(message)

        async def run() -> None:
            try:
                await self._app(dict(scope), receive, send)
            finally:
                messages.put_nowait(None)

        task = asyncio.ensure_future(run())
        self._answering.add(task)
        task.add_done_callback(self._answering.discard)
        try:
            while (message := await messages.get()) is not None:
                yield message
            await task
        finally:
            gone.set()

    async def whole(self, scope: dict[str, Any], body: bytes) -> tuple[int, bytes]:
        """Return status and body of the response to a request."""
        start, *parts = [message async for message in self.answer(scope, body)]
        return start["status"], b"".join(each.get("body", b"") for each in parts)

    async def _start(self) -> None:
        async with self._starting:
            if self._life is None:
                life = self._app.router.lifespan_context(self._app)
                await life.__aenter__()
                self._life = life

    async def __del__(self) -> None:  # Ray's hook: called once, when the requests under way are over
        if self._life is not None:
            await self._life.__aexit__(None, None, None)


class Gateway:
    """Send each request to the replica of its conversation."""

    def __init__(self, settings: RaySettings, replicas: Any) -> None:
        """replicas: handle of their deployment."""
        self._replicas, self._server = replicas, settings.server()
        self._security = Security(_nothing, self._server)
        self._store = Store(settings.session_dir, Sealer(self._server.session_key))
        self._disk = ThreadPoolExecutor(1, "loopserve store")

    async def __call__(self, request: Request) -> Response:
        """Answer a request. What is wrong with it, the replica says; only its sender and its size are checked here as well."""
        try:
            tenant = self._security.tenant(request.headers, request.scope["path"])
            body = await read_bytes(request, self._server.max_body_bytes) if request.method == "POST" else b""
            scope = {name: request.scope[name] for name in _SCOPE if name in request.scope}
            if _UNDER_WAY.fullmatch(scope["path"]):
                return await self._asked_everywhere(scope, body)
            key = await asyncio.get_running_loop().run_in_executor(self._disk, self._key, request, tenant, body)
            return await self._passed_on(scope, body, key)
        except (ApiError, LoopServeError) as error:
            found = as_api_error(error)
            return JSONResponse(found.body, found.status, found.headers)

    def _key(self, request: Request, tenant: str, body: bytes) -> str:
        """Return the routing key of a request; empty if any replica may answer it."""
        model = REQUESTS.get(request.scope["path"])
        if model is None:
            return ""
        with suppress(ApiError, LoopServeError, sqlite3.DatabaseError):
            given = parse_body(body, model)
            return routing_key(self._store, tenant, request, given, messages_in(given))
        return ""

    async def _asked_everywhere(self, scope: dict[str, Any], body: bytes) -> Response:
        """Return what the replica says that has a response under way; if none has, what any of them says."""
        found = await self._replicas.broadcast("whole", scope, body).results_async(return_exceptions=True)
        answers = [each for each in found if not isinstance(each, Exception)]
        if not answers:
            raise _failed()
        status, content = min(answers)
        return Response(content, status, media_type="application/json")

    async def _passed_on(self, scope: dict[str, Any], body: bytes, key: str) -> Response:
        stream = self._replicas.answer.options(stream=True, session_id=key).remote(scope, body)
        try:
            start = await anext(stream)
        except BackPressureError as error:
            raise overloaded("every replica has as many requests as it takes: try again later") from error
        except (RayError, RayServeException) as error:
            raise _failed() from error
        except BaseException:
            stream.cancel()
            raise
        response = StreamingResponse(_content(stream, dict(start["headers"])), start["status"])
        response.raw_headers = [(bytes(name), bytes(value)) for name, value in start["headers"]]
        return response


async def _content(stream: Any, headers: dict[bytes, bytes]) -> AsyncIterator[bytes]:
    """Yield the body of a response. A failure ends a stream of events with an error event, and breaks any other response."""
    complete = False
    try:
        async for message in stream:
            complete = not message.get("more_body", False)
            if message.get("body"):
                yield message["body"]
    except (RayError, RayServeException):
        if not headers.get(b"content-type", b"").startswith(b"text/event-stream"):
            raise
        complete = True
        yield f"data: {_failed().text}\n\n".encode()
    finally:
        if not complete:
            stream.cancel()


def _failed() -> ApiError:
    again = {"Retry-After": str(RETRY_AFTER_S)}
    return ApiError(503, "the replica failed: send the request again", code="engine_restarted", headers=again)


async def _nothing(*_: Any) -> None: ...


def build(args: dict[str, Any]) -> Any:
    """Return the Serve application for arguments, see ``RaySettings``. Raises ConfigError for settings that are not safe."""
    settings = RaySettings.model_validate(args)
    settings.server().check()
    if settings.api_key_file is None and not settings.insecure:
        raise ConfigError(
            "api_key_file: other machines may reach Ray's proxy, and could use the model and read every conversation; "
            "give a file of keys, or 'insecure: true' if that is what you want"
        )
    deployment: Callable[..., Any] = serve.deployment
    replicas = deployment(
        Replica,
        num_replicas=settings.num_replicas,
        ray_actor_options={"num_cpus": settings.num_cpus, "num_gpus": settings.num_gpus},
        max_ongoing_requests=settings.max_num_seqs + settings.max_queued,
        max_queued_requests=settings.max_queued_at_gateway,
        graceful_shutdown_timeout_s=settings.shutdown_timeout_s
        + 10,  # the last turns are written after the last answer
        graceful_shutdown_wait_loop_s=0.5,
        request_router_config=RequestRouterConfig(request_router_class=_ROUTER),
    )
    gateway = deployment(
        Gateway,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=_GATEWAY_REQUESTS,
        max_queued_requests=_GATEWAY_REQUESTS,
        backpressure_config=BackpressureConfig(status_code=503, retry_after_s=RETRY_AFTER_S),
        graceful_shutdown_timeout_s=settings.shutdown_timeout_s + 10,
    )
    return gateway.bind(settings, replicas.bind(settings))
