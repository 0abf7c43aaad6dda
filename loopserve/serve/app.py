"""Put the server together: one FastAPI app around one engine."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

import loopserve
from loopserve.api import Engine
from loopserve.core.errors import LoopServeError
from loopserve.core.stack.stack import PolicyStack
from loopserve.serve import chat, completions, conversation_routes, info_routes, page, responses, session_routes
from loopserve.serve.conversations import Conversations
from loopserve.serve.errors import ApiError, as_api_error, invalid
from loopserve.serve.metrics import Metrics
from loopserve.serve.security import Security
from loopserve.serve.server import Server
from loopserve.serve.sessions import Sessions
from loopserve.serve.settings import ServerSettings
from loopserve.serve.streaming import Disconnected
from loopserve.serve.structured import Grammars

_log = logging.getLogger("loopserve.serve")
_EXPIRE_EVERY_S = 60.0
_CLIENT_LEFT = 499  # nobody reads it; it is for the access log


def create_app(engine: Engine, settings: ServerSettings, stacks: Mapping[str, PolicyStack] | None = None) -> FastAPI:
    """Return the app. Its lifespan starts and stops the model's thread; ``app.state.server`` holds the parts.

    stacks: those that a request may name beside the engine's own. Raises ConfigError for settings that are refused.
    """
    settings.check()
    conversations = Conversations(engine, settings, stacks)
    server = Server(settings, conversations, Metrics(conversations), Sessions(conversations), Grammars(engine))

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        conversations.start()
        expiring = asyncio.ensure_future(_expire(server))
        try:
            yield
        finally:
            server.draining = True
            expiring.cancel()
            await conversations.close()

    app = FastAPI(title="loopserve", version=loopserve.__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.server = server
    for module in (chat, completions, responses, conversation_routes, session_routes, info_routes, page):
        app.include_router(module.router)
    app.add_middleware(Security, settings=settings, check_space=lambda tenant: conversations.worker.check_space(tenant))
    for kind in (Exception, HTTPException, RequestValidationError, ApiError, LoopServeError, Disconnected):
        app.add_exception_handler(kind, _answer_error)
    return app


async def _expire(server: Server) -> None:
    """Delete sessions that rest too long, again and again."""
    while True:
        try:
            await server.sessions.expire()
        except Exception:
            _log.exception("sessions that rest too long could not be deleted")
        await asyncio.sleep(_EXPIRE_EVERY_S)


async def _answer_error(request: Request, error: Exception) -> Response:
    if isinstance(error, Disconnected | asyncio.CancelledError):
        return Response(status_code=_CLIENT_LEFT)
    if isinstance(error, HTTPException):
        error = ApiError(error.status_code, f"{request.method} {request.url.path[:200]}: {error.detail}")
    if isinstance(error, RequestValidationError):
        first = error.errors()[0]
        place = ".".join(str(each) for each in first["loc"][1:])[:200]
        error = invalid(f"{place}: {first['msg']}", place or None)
    found = as_api_error(error)
    return JSONResponse(found.body, found.status, found.headers)
