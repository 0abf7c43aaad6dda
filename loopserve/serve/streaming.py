"""Keep an answer tied to its client: a client that leaves ends it, streaming or not."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import AsyncExitStack, suppress
from typing import Any, TypeVar

from fastapi import Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from loopserve.serve.errors import as_api_error

KEEP_ALIVE_S = 15.0
T = TypeVar("T")


class Disconnected(Exception):
    """Report that the client left before its answer was complete."""


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Return the result of ``work``. Cancels it and raises Disconnected if the client leaves before."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Disconnected
        return task.result()
    finally:
        gone.cancel()
        if not task.done():
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class EventStream(StreamingResponse):
    """Send server-sent events. ``resources`` are closed when the stream ends, however that happens."""

    def __init__(self, events: AsyncIterator[str], resources: AsyncExitStack, headers: dict[str, str]) -> None:
        """events: the data of each event, JSON. An error after the first byte becomes an event, and the stream ends there."""
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no", **headers}
        super().__init__(_framed(events), media_type="text/event-stream", headers=headers)
        self._resources = resources

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._resources:
            await super().__call__(scope, receive, send)


class Event(str):
    """A JSON text with the name of its event, which goes before it as a line of its own."""

    name: str

    def __new__(cls, name: str, data: str) -> Event:
        found = super().__new__(cls, data)
        found.name = name
        return found


def _named(data: str) -> str:
    return f"event: {data.name}\n" if isinstance(data, Event) else ""


async def _framed(events: AsyncIterator[str]) -> AsyncIterator[str]:
    waiting: asyncio.Future[str] | None = None
    try:
        while True:
            waiting = asyncio.ensure_future(anext(events))
            while not (await asyncio.wait({waiting}, timeout=KEEP_ALIVE_S))[0]:
                yield ": keep-alive\n\n"
            try:
                data = waiting.result()
            except StopAsyncIteration:
                return
            except Exception as error:
                yield f"data: {as_api_error(error).text}\n\n"
                return
            yield f"{_named(data)}data: {data}\n\n"
    finally:
        if waiting is not None:
            waiting.cancel()
