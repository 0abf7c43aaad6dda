"""Answer messages of many chat sessions in shared forward passes: all at once, or as they come from an event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from loopserve.core.engine.sampling import LogitsProcessor
from loopserve.core.engine.scheduler import Request, Scheduler
from loopserve.core.errors import InputError

if TYPE_CHECKING:
    from loopserve.chat_session import ChatSession, PendingAnswer, Reply

_IDLE_S = 1.0  # the thread of a runner ends after so long without work


def answer_all(
    scheduler: Scheduler, messages: Iterable[tuple[ChatSession, str]], options: dict[str, Any]
) -> list[Reply | BaseException]:
    """Answer one message of each session; return the replies in their order, an error in place of one that was not given.

    Raises InputError, before anything is computed, if a session appears twice.
    """
    asked = list(messages)
    if len({id(chat) for chat, _ in asked}) < len(asked):
        raise InputError("a session appears twice in the batch: send its second message when it has answered the first")
    outcomes: list[Reply | BaseException | None] = [None] * len(asked)
    running: dict[Request, tuple[int, PendingAnswer]] = {}
    waiting = list(enumerate(asked))[::-1]
    while waiting or running:
        while waiting and len(running) < scheduler.max_sessions:
            index, (chat, text) = waiting.pop()
            try:
                pending = chat.pending(text, options)
                running[_submit(scheduler, pending, ())] = (index, pending)
            except Exception as error:
                outcomes[index] = error
        scheduler.step()
        for request in [each for each in running if each.done.is_set()]:
            index, pending = running.pop(request)
            outcomes[index] = request.error or pending.conclude(_turn(request))
    return [each for each in outcomes if each is not None]


def _submit(
    scheduler: Scheduler, pending: PendingAnswer, processors: Sequence[LogitsProcessor], **options: Any
) -> Request:
    return scheduler.submit(
        pending.session,
        pending.new_tokens,
        pending.config,
        logits_processors=processors,
        **pending.options,
        **options,
    )


def _turn(request: Request) -> Any:
    assert request.turn is not None
    return request.turn


class Runner:
    """Run a scheduler in a thread of its own while there is work."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    async def stream(
        self, chat: ChatSession, text: str, processors: Sequence[LogitsProcessor], options: dict[str, Any]
    ) -> AsyncIterator[str]:
        """Give the answer to a message piece by piece. A consumer that leaves, or is cancelled, takes the turn back."""
        loop, pieces = asyncio.get_running_loop(), asyncio.Queue[tuple[str, bool]]()
        pending = await asyncio.to_thread(chat.pending, text, options)  # it may compute earlier turns anew

        def progressed(request: Request) -> None:
            piece = pending.piece(request.turn) if request.turn is not None else ""
            loop.call_soon_threadsafe(pieces.put_nowait, (piece, request.done.is_set()))

        request = _submit(self.scheduler, pending, processors, listener=progressed)
        self._start()
        concluded = False
        try:
            done = False
            while not done:
                piece, done = await pieces.get()
                if request.error is not None:
                    raise request.error
                if piece:
                    yield piece
            pending.conclude(_turn(request))
            concluded = True
        finally:
            if not concluded:
                self.scheduler.cancel(request)
                await asyncio.to_thread(request.done.wait)
                if request.error is None:
                    _turn(request).take_back()

    def _start(self) -> None:
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="loopserve passes", daemon=True)
                self._thread.start()

    def _run(self) -> None:
        while True:
            if self.scheduler.wait_for_work(_IDLE_S):
                self.scheduler.step()
                continue
            with self._lock:
                if not self.scheduler.wait_for_work(0):
                    self._thread = None
                    return
