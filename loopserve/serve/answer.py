"""Follow one or several answers to one request: text as it arrives, the reply, cancellation."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from loopserve.api import Engine
from loopserve.core.engine.sampling import ChosenLogprob, FinishReason
from loopserve.core.engine.scheduler import Request
from loopserve.core.engine.session import Session
from loopserve.core.engine.stats import TurnStats
from loopserve.models.answer_text import AnswerText
from loopserve.models.chat import Prompt, StreamDecoder
from loopserve.models.logprobs import TokenLogprob, token_logprobs


@dataclass(frozen=True)
class Reply:
    """Hold one complete answer."""

    text: str  # without reasoning and stop string
    reasoning: str | None
    tokens: tuple[int, ...]  # as generated, the stop token included
    finish_reason: FinishReason
    stop_string: str | None
    logprobs: tuple[TokenLogprob, ...] | None
    stats: TurnStats


@dataclass(frozen=True)
class Delta:
    """Hold what one pass added to the answer ``index``. reply: set with its last delta, once the turn is committed."""

    index: int
    text: str
    logprobs: tuple[TokenLogprob, ...] = ()
    reply: Reply | None = None


class Choice:
    """Hold one answer under way. ``progressed`` runs in the model's thread, all else in the event loop."""

    def __init__(
        self,
        index: int,
        engine: Engine,
        session: Session,
        opened: Prompt,
        stop: Sequence[str],
        loop: asyncio.AbstractEventLoop,
        events: asyncio.Queue[tuple[Choice, Delta | BaseException]],
    ) -> None:
        self.index, self.session, self.request = index, session, None
        self.request: Request | None
        self.committed = self.started = False
        self._engine, self._opened, self._loop, self._events = engine, opened, loop, events
        self.text = AnswerText(engine.tokenizer, stop, StreamDecoder(engine.tokenizer, opened.text))
        self._reported = 0  # tokens whose log-probabilities were given

    @property
    def options(self) -> dict[str, Any]:
        """Return what ends the answer, as keywords of ``Scheduler.submit``."""
        return {"stop_ids": self._engine.stop_ids, "stop_check": self.text.push}

    def progressed(self, request: Request) -> None:
        """Give the event loop what a pass added."""
        if request.error is not None:
            self._send(request.error)
            return
        if request.turn is None:
            return
        reply = None
        if request.done.is_set():
            self.text.close()
            reply = self._conclude(request)
        self._send(Delta(self.index, self.text.take(), self._new_logprobs(request), reply))

    def _send(self, event: Delta | BaseException) -> None:
        try:
            self._loop.call_soon_threadsafe(self._events.put_nowait, (self, event))
        except RuntimeError:  # the loop is closed: nobody is there to read
            return

    def _new_logprobs(self, request: Request) -> tuple[TokenLogprob, ...]:
        found = request.turn.logprobs if request.turn is not None else None
        if found is None:
            return ()
        new = found[self._reported :]
        self._reported = len(found)
        return self._said(new)

    def _said(self, chosen: Sequence[ChosenLogprob]) -> tuple[TokenLogprob, ...]:
        """Return the log-probabilities of tokens, without a stop token, which is no part of the text."""
        own = [each for each in chosen if each.token_id not in self._engine.stop_ids]
        return token_logprobs(self._engine.tokenizer, own)

    def _conclude(self, request: Request) -> Reply:
        turn, tokenizer = request.turn, self._engine.tokenizer
        assert turn is not None and turn.finish_reason is not None
        answer = tokenizer.read_answer(turn.output, self._opened.text)
        if self.text.stop_string is not None:
            answer = replace(answer, text=self.text.text)
        return Reply(
            text=answer.text,
            reasoning=answer.reasoning,
            tokens=tuple(turn.output),
            finish_reason=turn.finish_reason if self.text.stop_string is None else FinishReason.STOP,
            stop_string=self.text.stop_string,
            logprobs=None if turn.logprobs is None else self._said(turn.logprobs),
            stats=self.session.stats,
        )
