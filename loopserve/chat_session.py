"""A conversation in text with an engine: turns, undo, retry, fork, save."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from loopserve.conversation_file import save_messages
from loopserve.core.engine.engine import Progress
from loopserve.core.engine.sampling import FinishReason, LogitsProcessor, SamplingConfig
from loopserve.core.engine.session import Session
from loopserve.core.engine.stats import TurnStats
from loopserve.core.engine.turn import Turn
from loopserve.core.errors import InputError
from loopserve.models.answer_text import AnswerText
from loopserve.models.chat import Message, writable
from loopserve.models.logprobs import TokenLogprob, token_logprobs

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
    """One answer and what it took."""

    text: str  # without a stop string
    token_ids: tuple[int, ...]  # up to and including a stop token, or the token that completed a stop string
    usage: Usage
    timings: Timings
    stats: TurnStats
    finish_reason: FinishReason  # stop: a stop token or stop string; length: max_new_tokens or the model's window
    stop_string: str | None = None  # the one that ended the answer
    logprobs: tuple[TokenLogprob, ...] | None = None  # one entry per token of token_ids, where asked for


class ChatSession:
    """A conversation in text. A turn that breaks off (an error, Ctrl-C) is taken back; nothing said before it is lost."""

    def __init__(self, engine: Engine, system: str | None = None, messages: list[Message] | None = None) -> None:
        self.engine = engine
        self.messages: list[Message] = list(messages or [])
        if system is not None:
            if not isinstance(system, str) or not writable(system):
                raise InputError("the system message is no text; give it as UTF-8")
            self.messages.insert(0, {"role": "system", "content": system})
        self.last_reply: Reply | None = None
        self._session: Session | None = engine.token_engine.session()
        # Number of messages before each turn. Turns of a loaded conversation count: they can be taken back as well.
        self._lengths = [n for n, message in enumerate(self.messages) if message["role"] == "user"]

    def __enter__(self) -> ChatSession:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free the cache. The messages stay readable."""
        self._session = None

    @property
    def turns(self) -> list[TurnStats]:
        return self._open.turns

    @property
    def _open(self) -> Session:
        if self._session is None:
            raise InputError("the session is closed; open a new one with engine.session()")
        return self._session

    def send(self, text: str, *, logits_processors: Sequence[LogitsProcessor] = (), **options: Any) -> Reply:
        """Say something, get the whole answer. The arguments are those of ``stream``."""
        for _ in self.stream(text, logits_processors=logits_processors, **options):
            pass
        assert self.last_reply is not None
        return self.last_reply

    def stream(
        self,
        text: str,
        *,
        logits_processors: Sequence[LogitsProcessor] = (),
        progress: Progress | None = None,
        **options: Any,
    ) -> Iterator[str]:
        """Give the answer piece by piece; ``last_reply`` holds the whole once it is over.

        options: those of ``SamplingConfig``, and ``sampling`` to choose other defaults than the engine's (see ``Engine``).
        logits_processors: functions from ``(input_ids [1, T], scores [1, V])`` to scores, as those of transformers. No piece
        holds a part of a stop string. progress: called before each pass of the prefill with the tokens that are computed and
        those of the whole prefill. Raises ConfigError for a wrong option, InputError for a message that cannot be asked.
        """
        config = self.engine.sampling_config(options)
        if not isinstance(text, str):
            raise InputError(f"a message is text, not {type(text).__name__}")
        self._open.require_rest()
        self._asked(text)  # a message that cannot be asked is refused at once
        return self._answer(text, config, logits_processors, progress)

    def _asked(self, text: str) -> tuple[list[Message], list[int]]:
        """The conversation with this message, and the tokens that it adds."""
        asked = [*self.messages, {"role": "user", "content": text}]
        return asked, self._new_ids(self._open, asked)

    def _answer(
        self,
        text: str,
        config: SamplingConfig,
        processors: Sequence[LogitsProcessor],
        progress: Progress | None,
    ) -> Iterator[str]:
        engine, session = self.engine, self._open
        asked, ids = self._asked(text)  # now, as other turns may have been held since the stream was opened
        answer = AnswerText(engine.tokenizer, config.stop)
        turn = engine.token_engine.begin(
            session,
            ids,
            config,
            stop_ids=engine.stop_ids,
            stop_check=answer.push,
            logits_processors=processors,
        )
        for _ in engine.token_engine.finish(turn, progress):
            if turn.finished:
                answer.close()
            if piece := answer.take():
                yield piece
        reply = self._reply(turn, answer)
        self._lengths.append(len(self.messages))
        self.messages = [*asked, {"role": "assistant", "content": reply.text}]
        self.last_reply = reply

    def _new_ids(self, session: Session, asked: list[Message]) -> list[int]:
        tokenizer = self.engine.tokenizer
        if session.tokens:
            return tokenizer.turn_tokens(asked, self._end_token(session.tokens))
        ids: list[int] = []  # a loaded conversation: every turn of it is rendered as it was
        for end, message in enumerate(asked, 1):
            if message["role"] == "user":
                ids += tokenizer.turn_tokens(asked[:end], self._end_token(ids))
            elif message["role"] == "assistant":
                ids += tokenizer.answer_tokens(message["content"])
        return ids

    def _end_token(self, tokens: list[int]) -> int | None:
        """The end-of-turn token the conversation ends with, if the model gave it itself."""
        return tokens[-1] if tokens and tokens[-1] in self.engine.stop_ids else None

    def _reply(self, turn: Turn, answer: AnswerText) -> Reply:
        stats = turn.session.stats
        assert turn.finish_reason is not None
        return Reply(
            text=answer.text.strip(),
            token_ids=tuple(turn.output),
            usage=Usage(stats.prompt_tokens, stats.reused_tokens, stats.output_tokens),
            timings=Timings(stats.ttft_ms, stats.tpot_ms),
            stats=stats,
            finish_reason=turn.finish_reason if answer.stop_string is None else FinishReason.STOP,
            stop_string=answer.stop_string,
            logprobs=None if turn.logprobs is None else token_logprobs(self.engine.tokenizer, turn.logprobs),
        )

    def undo(self) -> Message:
        """Take back the last turn, one of a loaded conversation included; returns the user's message of it."""
        session = self._open
        if not self._lengths:
            raise InputError("nothing to undo: the conversation has no turn")
        if session.turns:
            session.undo()
        else:
            session.require_rest()  # a loaded turn: it is not computed before the next message
        taken = self.messages[self._lengths[-1]]
        self.messages = self.messages[: self._lengths.pop()]
        self.last_reply = None
        return taken

    def retry(self, **options: Any) -> Reply:
        """Take back the last answer and give another one to the same message; if that breaks off, the old one stays.

        options: those of ``stream``.
        """
        for _ in self.stream_retry(**options):
            pass
        assert self.last_reply is not None
        return self.last_reply

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
        other = ChatSession(self.engine)
        other._become(self)
        other._session = self._open.fork()
        return other

    def _become(self, other: ChatSession) -> None:
        self.messages, self._lengths = list(other.messages), list(other._lengths)
        self.last_reply, self._session = other.last_reply, other._session

    def save(self, path: str | Path) -> None:
        """Write the messages as JSON, with the stack for the record; ``Engine.load_session`` reads the messages.

        The file is replaced as a whole. Raises InputError if that fails; what it held before is unchanged then.
        """
        save_messages(path, self.messages, self.engine.stack.describe())
