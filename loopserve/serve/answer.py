"""Follow one or several answers to one request: text as it arrives, the reply, cancellation."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from loopserve.api import Engine
from loopserve.core.engine.sampling import ChosenLogprob, FinishReason
from loopserve.core.engine.scheduler import Request
from loopserve.core.engine.session import Session
from loopserve.core.engine.stats import TurnStats
from loopserve.core.stack.stack import PolicyStack
from loopserve.models.answer_text import AnswerText
from loopserve.models.answers import StreamDecoder
from loopserve.models.chat import Prompt
from loopserve.models.logprobs import TokenLogprob, token_logprobs
from loopserve.models.tool_calls import CallReader, ToolCall
from loopserve.serve.ask import Ask, Match
from loopserve.serve.attention import AttendedParts
from loopserve.serve.records import StoredTurn

# What happens to the answers to a request, in order; an error belongs to none of them alone.
Events = asyncio.Queue[tuple["Choice | None", "Delta | BaseException"]]
FIRST_S = 10.0  # headers of a stream wait so long for the first token, to say what was reused


@dataclass(frozen=True)
class Reply:
    """Hold one complete answer."""

    text: str  # without reasoning, tool calls and stop string
    reasoning: str | None
    tokens: tuple[int, ...]  # as generated, the stop token included
    finish_reason: FinishReason
    stop_string: str | None
    logprobs: tuple[TokenLogprob, ...] | None
    stats: TurnStats
    calls: tuple[ToolCall, ...] = ()
    attention: dict[str, Any] | None = (
        None  # which parts of the conversation it attended to, where the request asks for it
    )


@dataclass(frozen=True)
class Delta:
    """Hold what one pass added to the answer ``index``. reply: set with its last delta, once the turn is committed."""

    index: int
    text: str
    logprobs: tuple[TokenLogprob, ...] = ()
    reply: Reply | None = None
    reasoning: str = ""
    calls: tuple[ToolCall, ...] = ()
    attention: dict[str, Any] | None = None  # of the latest step


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
        events: Events,
        *,
        most_calls: int | None = 0,
    ) -> None:
        """most_calls: tool calls that the answer may hold; None: any number. With the last one the answer ends."""
        self.index, self.session = index, session
        self.request: Request | None = None
        self.attended: AttendedParts | None = None
        self.committed = self.started = False
        self._engine, self._opened, self._loop, self._events = engine, opened, loop, events
        self.text = AnswerText(engine.tokenizer, stop, StreamDecoder(engine.tokenizer, opened.text))
        known = engine.tokenizer.tool_format
        self._reader = CallReader(known) if most_calls != 0 and known is not None else None
        self._spoken = ""  # text that was given, where calls are read
        self._thought = 0  # characters of the reasoning that were given
        self._calls: list[ToolCall] = []
        self._most = most_calls
        self._reported = 0  # tokens whose log-probabilities were given

    @property
    def options(self) -> dict[str, Any]:
        """Return what ends the answer, as keywords of ``Scheduler.submit``."""
        return {"stop_ids": self._engine.stop_ids, "stop_check": self._stops}

    def _stops(self, token: int) -> str | None:
        """Return the text that ends the answer with a token."""
        found = self.text.push(token)
        end = self._engine.tokenizer.tool_format.end if self._reader and self._engine.tokenizer.tool_format else ""
        if found is None and self._most is not None and end and end in self.text.text:
            return end
        return found

    def progressed(self, request: Request) -> None:
        """Give the event loop what a pass added."""
        if request.turn is None:
            return
        over = request.done.is_set()
        if over:
            self.text.close()
        text, calls = self._read(self.text.take(), over=over)
        reasoning = self.text.reasoning[self._thought :]
        self._thought += len(reasoning)
        reply = self._conclude(request) if over else None
        latest = None if self.attended is None else self.attended.latest()
        self.send(Delta(self.index, text, self._new_logprobs(request), reply, reasoning, tuple(calls), latest))

    def _read(self, text: str, *, over: bool) -> tuple[str, list[ToolCall]]:
        """Return the text of a piece without the calls in it, and the calls that are complete with it."""
        if self._reader is None:
            return text, []
        spoken, calls = self._reader.push(text)
        if over:
            more, rest = self._reader.close()
            spoken, calls = spoken + more, calls + rest
        if self._most is not None:
            calls = calls[: self._most - len(self._calls)]
        self._spoken += spoken
        self._calls += calls
        return spoken, calls

    def send(self, event: Delta | BaseException) -> None:
        """Give the event loop an event, from any thread."""
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
        if self._reader is not None:
            answer = replace(answer, text=self._spoken)
        return Reply(
            text=answer.text,
            reasoning=answer.reasoning,
            tokens=tuple(turn.output),
            finish_reason=turn.finish_reason if self.text.stop_string is None else FinishReason.STOP,
            stop_string=self.text.stop_string,
            logprobs=None if turn.logprobs is None else self._said(turn.logprobs),
            stats=self.session.stats,
            calls=tuple(self._calls),
            attention=None if self.attended is None else self.attended.as_dict(),
        )


@dataclass(eq=False)
class Answer:
    """Hold the answers to one request while they are written. Iterate over it for their deltas."""

    id: str
    ask: Ask
    match: Match
    prompt: Prompt
    stack: PolicyStack
    commit: Callable[[Answer, Choice, Reply], Coroutine[Any, Any, None]] = field(repr=False)
    created: float = field(default_factory=time.time)
    choices: list[Choice] = field(default_factory=list)
    events: Events = field(default_factory=asyncio.Queue)
    prefill: Request | None = None  # of the prompt, where several answers are asked for
    turns: dict[int, StoredTurn] = field(default_factory=dict)  # committed, by index of the answer
    cached_tokens: int = 0  # of the prompt, that were not computed for this request
    closed: bool = False
    restarts: int | None = None  # of the engine, when the model's thread took the request in
    _first: asyncio.Task[tuple[Choice | None, Delta | BaseException]] | None = None

    @property
    def prompt_tokens(self) -> int:
        """Return the tokens of the whole conversation before the answer."""
        return len(self.match.path.tokens) + len(self.prompt.tokens)

    @property
    def cache_note(self) -> str:
        """Return what was reused, or why nothing was, as the header says it."""
        if self.cached_tokens:
            return f"hit {self.cached_tokens}"
        return f"miss: {self.match.reason or 'the cache of this conversation was released'}"

    async def wait_for_first(self) -> None:
        """Wait for the first delta, at most some seconds; raise the error if the request failed before it."""
        self._first = asyncio.create_task(self.events.get())
        done, _ = await asyncio.wait({self._first}, timeout=FIRST_S)
        if done and isinstance(error := self._first.result()[1], BaseException):
            raise error

    async def _next(self) -> tuple[Choice | None, Delta | BaseException]:
        first, self._first = self._first, None
        return await (first if first is not None else self.events.get())

    async def __aiter__(self) -> AsyncIterator[Delta]:
        left = self.ask.n
        while left:
            choice, event = await self._next()
            if isinstance(event, BaseException):
                raise event
            if event.reply is not None:
                left -= 1
                assert choice is not None
                await self.commit(self, choice, event.reply)
            yield event

    def abort(self, error: BaseException) -> None:
        """End the answers with an error, which whoever reads them gets."""
        self.events.put_nowait((None, error))

    async def replies(self) -> list[Reply]:
        """Read every delta; return the answers in their order."""
        found = {delta.index: delta.reply async for delta in self if delta.reply is not None}
        return [found[index] for index in sorted(found)]
