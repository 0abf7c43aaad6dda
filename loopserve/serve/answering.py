"""Answer a request whole or as a stream: what chat completions and completions do alike."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from typing import Any, TypeVar

from fastapi import Request
from starlette.responses import JSONResponse, Response

from loopserve.serve.answer import Answer, Reply
from loopserve.serve.ask import Ask
from loopserve.serve.protocol import ChatRequest, CompletionRequest
from loopserve.serve.rendering import headers
from loopserve.serve.server import Server
from loopserve.serve.streaming import EventStream, while_connected

Body = TypeVar("Body", ChatRequest, CompletionRequest)


async def answered(
    request: Request,
    server: Server,
    body: Body,
    ask: Ask,
    *,
    chunks: Callable[[Server, Body, Answer], AsyncIterator[str]],
    whole: Callable[[Server, Answer, list[Reply]], dict[str, Any]],
) -> Response:
    """Return the answer to ``ask``; a client that leaves ends it. chunks: texts of a stream. whole: body of a complete answer."""
    async with AsyncExitStack() as held:
        answer = await while_connected(request, held.enter_async_context(server.conversations.begin(ask)))
        server.metrics.began(answer)
        if body.stream:
            return EventStream(chunks(server, body, answer), held.pop_all(), headers(answer))
        replies = await while_connected(request, answer.replies())
        server.metrics.ended(answer, replies)
        return JSONResponse(whole(server, answer, replies), headers=headers(answer))
    raise AssertionError("unreachable")
