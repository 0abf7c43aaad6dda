"""A conversation in text with an engine: turns, undo, retry, fork, save."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any
from uuid import uuid4
from weakref import WeakValueDictionary

from loopserve.core.atomic_file import write_atomically
from loopserve.core.engine.engine import Progress
from loopserve.core.engine.sampling import FinishReason, LogitsProcessor, SamplingConfig
from loopserve.core.engine.session import Session
from loopserve.core.engine.stats import TurnStats
from loopserve.core.engine.turn import Turn
from loopserve.core.errors import InputError
from loopserve.core.stack.stack import PolicyStack
from loopserve.models.answer_text import AnswerText
from loopserve.models.answers import StreamDecoder
from loopserve.models.chat import Answered, Prompt
from loopserve.models.logprobs import TokenLogprob, token_logprobs
from loopserve.models.messages import Message, as_messages, writable
from loopserve.transcript import Transcript, TranscriptTurn, bring_to

if TYPE_CHECKING:
    from loopserve.api import Engine


@dataclass(frozen=True)
class Usage:
    prompt_tokens: int  # tokens this turn added
    reused_tokens: int  # tokens the conversation held already
    completion_tokens: int


@dataclass(frozen=True)
class Timings:
    ttft_ms: float
    tpot_ms: float | None  # None for an answer of one token


@dataclass(frozen=True)
class Reply:
    """Hold one answer and what it took."""

    text: str  # the answer itself: without a stop string, and without what the model wrote before it
    token_ids: tuple[int, ...]  # up to and including a stop token, or the token that completed a stop string
    usage: Usage
    timings: Timings
    stats: TurnStats
    finish_reason: FinishReason  # stop: a stop token or stop string; length: max_new_tokens or the model's window
    stop_string: str | None = None  # the one that ended the answer
    logprobs: tuple[TokenLogprob, ...] | None = None  # one entry per token of token_ids, where asked for
    reasoning: str | None = None  # of a reasoning block or of other channels than the final one; None: none was written


class PendingAnswer:
    """Hold one message under way: the tokens it adds, the text of the answer so far, and the reply once the turn is over."""

    def __init__(self, chat: ChatSession, asked: list[Message], prompt: Prompt, config: SamplingConfig) -> None:
        """Bring the chat's session to the beginning of the prompt. Raises InputError, before anything is changed, for a prompt
        that does not fit the model.
        """
        engine, self.session = chat.engine, chat.open_session
        self.config = config
        self._chat, self._asked, self._prompt = chat, asked, prompt
        self._text = AnswerText(engine.tokenizer, config.stop, StreamDecoder(engine.tokenizer, prompt.text))
        engine.token_engine.check_fit(prompt.tokens, config, stop_check=self._text.push)
        self._reused, self._history_ms = chat.prepare(asked, prompt)
        self._depth = len(self.session.turns)
        self.new_tokens = prompt.tokens[len(self.session.tokens) :]

    @property
    def options(self) -> dict[str, Any]:
        """The conditions that end the answer, as keywords of ``TokenEngine.begin`` and ``Scheduler.submit``."""
        return {"stop_ids": self._chat.engine.stop_ids, "stop_check": self._text.push}

    def piece(self, turn: Turn) -> str:
        """Return the text that has become certain since the last call."""
        if turn.finished:
            self._text.close()
        return self._text.take()

    def conclude(self, turn: Turn) -> Reply:
        """Take the finished turn into the conversation."""
        tokenizer, stats, output = self._chat.engine.tokenizer, self.session.stats, tuple(turn.output)
        assert turn.finish_reason is not None
        self._text.close()
        answer = tokenizer.read_answer(output, self._prompt.text)
        if self._text.stop_string is not None:
            answer = replace(answer, text=self._text.text)
        answered = Answered(len(self._asked), self._prompt, answer, output)
        reply = Reply(
            text=answer.text.strip(),
            token_ids=output,
            usage=Usage(len(self._prompt.tokens) - self._reused, self._reused, stats.output_tokens),
            timings=Timings(stats.ttft_ms + self._history_ms, stats.tpot_ms),
            stats=stats,
            finish_reason=turn.finish_reason if self._text.stop_string is None else FinishReason.STOP,
            stop_string=self._text.stop_string,
            logprobs=None if turn.logprobs is None else token_logprobs(tokenizer, turn.logprobs),
            reasoning=answer.reasoning,
        )
        self._chat.take(self._asked, TranscriptTurn(answered, stats, self._depth), reply)
        return reply


_ENGINES: WeakValueDictionary[str, Engine] = WeakValueDictionary()  # those of sessions that were pickled


class ChatSession:
    """A conversation in text. A turn that breaks off (an error, Ctrl-C) is taken back; nothing said before it is lost.

    Where the chat template rewrites what was said before (drops the reasoning of earlier answers, for example), the session goes
    back to the last turn that is left as it was and computes the rest anew. ``copy.deepcopy`` forks a session.
    """

    def __init__(
        self,
        engine: Engine,
        system: str | None = None,
        messages: Sequence[Message] | None = None,
        token_ids: dict[int, list[int]] | None = None,
        stack: PolicyStack | None = None,
    ) -> None:
        """messages: a conversation to go on with. token_ids: tokens of answers among them, by number of the message. stack: another
        one than the engine's.
        """
        self.engine = engine
        self.stack = stack or engine.stack
        begun = list(messages or [])
        if system is not None:
            if not isinstance(system, str) or not writable(system):
                raise InputError("the system message is no text; give it as UTF-8")
            begun.insert(0, {"role": "system", "content": system})
        self.last_reply: Reply | None = None
        self._transcript = Transcript(engine.tokenizer, begun, given_tokens=token_ids or {})
        self._session: Session | None = engine.token_engine.session(stack)
        self._rewrites = False  # the template was seen to rewrite earlier turns

    def __enter__(self) -> ChatSession:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free the cache and the policies' states at once. The messages stay readable."""
        if self._session is not None:
            self._session.close()
        self._session = None

    @property
    def messages(self) -> list[Message]:
        """Return the messages so far; an answer's reasoning stands beside it as ``reasoning_content``."""
        return self._transcript.messages

    @property
    def turns(self) -> list[TurnStats]:
        """Return the figures of the turns that were answered here."""
        self.open_session  # noqa: B018  # raises for a closed session
        return [turn.stats for turn in self._transcript.turns]

    @property
    def open_session(self) -> Session:
        """The session of tokens. InputError once the chat is closed."""
        if self._session is None:
            raise InputError("the session is closed; open a new one with engine.session()")
        return self._session

    def send(self, text: str, *, logits_processors: Sequence[LogitsProcessor] = (), **options: Any) -> Reply:
        """Say something, get the whole answer. The arguments are those of ``stream``."""
        return self._whole(self.stream(text, logits_processors=logits_processors, **options))

    def stream(
        self,
        text: str,
        *,
        logits_processors: Sequence[LogitsProcessor] = (),
        progress: Progress | None = None,
        **options: Any,
    ) -> Iterator[str]:
        """Give the answer piece by piece, without its reasoning; ``last_reply`` holds the whole once it is over.

        options: those of ``SamplingConfig``, and ``sampling`` to choose other defaults than the engine's (see ``Engine``).
        logits_processors: functions from ``(input_ids [1, T], scores [1, V])`` to scores, as those of transformers. No piece
        holds a part of a stop string. progress: called before each pass of the prefill with the tokens that are computed and
        those of the whole prefill. Raises ConfigError for a wrong option, InputError for a message that cannot be asked.
        """
        return self._begin(self._message(text), logits_processors, options, progress)

    def complete(
        self, messages: Sequence[Message], *, logits_processors: Sequence[LogitsProcessor] = (), **options: Any
    ) -> Reply:
        """Answer a whole conversation, given as the chat API has it, and go on from what this session holds of it.

        messages: dictionaries of role and content, the last one a user's. Compared message by message: what both have in common
        is not computed again, where they differ the session goes back to the last common turn. The other arguments are those of
        ``stream``. Raises InputError for what is no message.
        """
        return self._whole(self.stream_complete(messages, logits_processors=logits_processors, **options))

    def stream_complete(
        self, messages: Sequence[Message], *, logits_processors: Sequence[LogitsProcessor] = (), **options: Any
    ) -> Iterator[str]:
        """Like ``complete``, piece by piece."""
        given = as_messages(messages)

        def asked() -> list[Message]:
            common = self._transcript.common(given)
            return [*self.messages[:common], *given[common:]]

        return self._begin(asked, logits_processors, options)

    async def asend(self, text: str, *, logits_processors: Sequence[LogitsProcessor] = (), **options: Any) -> Reply:
        """Like ``send``, from an event loop: messages of several sessions are answered in shared passes."""
        async for _ in self.astream(text, logits_processors=logits_processors, **options):
            pass
        assert self.last_reply is not None
        return self.last_reply

    def astream(
        self, text: str, *, logits_processors: Sequence[LogitsProcessor] = (), **options: Any
    ) -> AsyncIterator[str]:
        """Like ``stream``, from an event loop. A consumer that leaves, or is cancelled, takes the turn back."""
        return self.engine.runner.stream(self, text, logits_processors, options)

    def pending(self, text: str, options: Mapping[str, Any]) -> PendingAnswer:
        """Prepare a message for a scheduler; nothing is computed yet. The options are those of ``stream``."""
        config, asked = self.engine.sampling_config(options), self._message(text)()
        self.open_session.require_rest()
        return PendingAnswer(self, asked, self._transcript.prompt(asked), config)

    def _message(self, text: str) -> Callable[[], list[Message]]:
        if not isinstance(text, str):
            raise InputError(f"a message is text, not {type(text).__name__}")
        return lambda: [*self.messages, {"role": "user", "content": text}]

    def _whole(self, pieces: Iterator[str]) -> Reply:
        for _ in pieces:
            pass
        assert self.last_reply is not None
        return self.last_reply

    def _begin(
        self,
        asked: Callable[[], list[Message]],
        processors: Sequence[LogitsProcessor],
        options: dict[str, Any],
        progress: Progress | None = None,
    ) -> Iterator[str]:
        config = self.engine.sampling_config(options)
        self.open_session.require_rest()
        prompt = self._transcript.prompt(asked())  # what cannot be asked is refused at once
        return self._answer(asked, self.messages, prompt, config, processors, progress)

    def _answer(
        self,
        ask: Callable[[], list[Message]],
        held: list[Message],
        prompt: Prompt,
        config: SamplingConfig,
        processors: Sequence[LogitsProcessor],
        progress: Progress | None,
    ) -> Iterator[str]:
        engine, session = self.engine.token_engine, self.open_session
        session.require_rest()
        asked = ask()
        if held is not self.messages:  # other turns have been held since the stream was opened
            prompt = self._transcript.prompt(asked)
        pending = PendingAnswer(self, asked, prompt, config)
        turn = engine.begin(session, pending.new_tokens, config, logits_processors=processors, **pending.options)
        concluded = False
        try:
            for _ in engine.finish(turn, progress):
                if piece := pending.piece(turn):
                    yield piece
            pending.conclude(turn)
            concluded = True
        finally:
            if not concluded and turn.finished and turn.error is None:  # left at the last piece: not in the transcript
                turn.take_back()

    def take(self, asked: list[Message], turn: TranscriptTurn, reply: Reply) -> None:
        """Take in a turn that was answered."""
        self._transcript.add(asked, turn)
        self.last_reply = reply

    def prepare(self, asked: list[Message], prompt: Prompt) -> tuple[int, float]:
        """Bring the session to the beginning of a prompt; return (tokens that it holds of it, ms spent on earlier turns).

        Under a template that rewrites earlier turns, they are computed as a turn of their own, so that the next rewriting goes
        back to there and not to the beginning.
        """
        session = self.open_session
        held, depth = len(session.tokens), len(session.turns)
        bring_to(session, prompt.tokens)
        if len(session.turns) < depth and self._transcript.common(asked) == len(self.messages):
            self._rewrites = True
        reused = min(held, len(session.tokens))
        if not self._rewrites or prompt.history is None or prompt.history <= reused:
            return reused, 0.0
        self.engine.token_engine.prefill(session, prompt.tokens[reused : prompt.history])
        return reused, session.stats.ttft_ms

    def undo(self) -> Message:
        """Take back the last turn, also one that was given at the beginning; returns the user's message of it."""
        session = self.open_session
        session.require_rest()
        taken = self._transcript.take_back()
        if taken is None:
            raise InputError("nothing to undo: the conversation has no turn")
        message, depth = taken
        while depth is not None and len(session.turns) > depth:
            session.undo()
        self.last_reply = None
        return message

    def retry(self, **options: Any) -> Reply:
        """Take back the last answer and give another one to the same message; if that breaks off, the old one stays.

        options: those of ``stream``.
        """
        return self._whole(self.stream_retry(**options))

    def stream_retry(self, **options: Any) -> Iterator[str]:
        """Like ``retry``, piece by piece."""
        kept = self.fork()
        done = False
        try:
            yield from self.stream(self.undo()["content"], **options)
            done = True
        finally:
            if not done:
                self._become(kept)

    def fork(self) -> ChatSession:
        """An independent copy of the conversation, to try two answers."""
        other = ChatSession(self.engine, stack=self.stack)
        other._become(self)
        other._session = self.open_session.fork()
        return other

    def __deepcopy__(self, memo: dict[int, Any]) -> ChatSession:
        return self.fork()

    def __reduce__(self) -> tuple[Callable[..., ChatSession], tuple[str, Transcript, Reply | None]]:
        """Pickle the conversation without engine and cache, which is computed anew with the next message."""
        self.open_session.require_rest()
        key = next((key for key, engine in _ENGINES.items() if engine is self.engine), None) or uuid4().hex
        _ENGINES[key] = self.engine
        transcript = self._transcript.copy()
        transcript.tokenizer = None  # type: ignore[assignment]  # the engine's
        return _unpickled, (key, transcript, self.last_reply)

    def _become(self, other: ChatSession) -> None:
        self._transcript, self._rewrites = other._transcript.copy(), other._rewrites
        self.last_reply, self._session = other.last_reply, other._session

    def save(self, path: str | Path) -> None:
        """Write the messages as JSON, with the stack for the record; ``Engine.load_session`` reads the messages.

        The tokens of the model's own answers are written beside them, so that the conversation goes on from the very same ones.
        The file is replaced as a whole. Raises InputError if that fails; what it held before is unchanged then.
        """
        body = {"version": 1, "stack": self.stack.describe(), "messages": self._transcript.saved()}
        try:
            write_atomically(path, json.dumps(body, indent=2, ensure_ascii=False) + "\n")
        except (OSError, ValueError) as error:  # ValueError: a name with a null byte
            reason = getattr(error, "strerror", None) or str(error)
            raise InputError(
                f"{path}: cannot save the conversation ({reason}); what the file held before is unchanged"
            ) from error


def _unpickled(key: str, transcript: Transcript, last_reply: Reply | None) -> ChatSession:
    engine = _ENGINES.get(key)
    if engine is None:
        raise InputError(
            "a pickled ChatSession goes on only where its engine is: write it with session.save(path) there, and read it with "
            "engine.load_session(path) here"
        )
    session = ChatSession(engine)
    transcript.tokenizer = engine.tokenizer
    transcript.turns, transcript.loaded = [], transcript.answered
    session._transcript, session.last_reply = transcript, last_reply
    return session
