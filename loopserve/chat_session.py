"""A conversation in text with an engine: turns, undo, retry, fork, save."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from loopserve.conversation_file import save_messages
from loopserve.core.engine.engine import Progress
from loopserve.core.engine.sampling import SamplingConfig
from loopserve.core.engine.session import Session
from loopserve.core.engine.stats import TurnStats
from loopserve.core.errors import ConfigError, InputError
from loopserve.models.chat import Message, StreamDecoder, writable

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

    text: str
    token_ids: tuple[int, ...]
    usage: Usage
    timings: Timings
    stats: TurnStats


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

    def send(self, text: str, **sampling: Any) -> Reply:
        """Say something, get the whole answer. Keywords are those of ``core.sampling.SamplingConfig``."""
        for _ in self.stream(text, **sampling):
            pass
        assert self.last_reply is not None
        return self.last_reply

    def stream(self, text: str, *, progress: Progress | None = None, **sampling: Any) -> Iterator[str]:
        """The answer piece by piece; ``last_reply`` holds the whole once it is over.

        progress: called before each pass of the prefill with the tokens that are computed and those of the whole prefill.
        """
        try:
            config = SamplingConfig(**sampling)
        except ValidationError as error:
            first = error.errors()[0]
            raise ConfigError(f"{'.'.join(map(str, first['loc']))}: {first['msg']} (got {first['input']!r})") from error
        if not isinstance(text, str):
            raise InputError(f"a message is text, not {type(text).__name__}")
        self._open.require_rest()
        self._asked(text)  # a message that cannot be asked is refused at once
        return self._answer(text, config, progress)

    def _asked(self, text: str) -> tuple[list[Message], list[int]]:
        """The conversation with this message, and the tokens that it adds."""
        asked = [*self.messages, {"role": "user", "content": text}]
        return asked, self._new_ids(self._open, asked)

    def _answer(self, text: str, config: SamplingConfig, progress: Progress | None) -> Iterator[str]:
        session = self._open
        asked, ids = self._asked(text)  # now, as other turns may have been held since the stream was opened
        decoder = StreamDecoder(self.engine.tokenizer)
        answer: list[int] = []
        tokens = self.engine.token_engine.generate(session, ids, config, self.engine.stop_ids, progress=progress)
        for token in tokens:
            answer.append(token)
            piece = decoder.push(token)
            if piece:
                yield piece
        reply = self._reply(answer, session.stats)
        self._lengths.append(len(self.messages))
        self.messages = [*asked, {"role": "assistant", "content": reply.text}]
        self.last_reply = reply
        if rest := decoder.rest():
            yield rest

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

    def _reply(self, answer: list[int], stats: TurnStats) -> Reply:
        return Reply(
            text=self.engine.tokenizer.decode(answer).strip(),
            token_ids=tuple(answer),
            usage=Usage(stats.prompt_tokens, stats.reused_tokens, stats.output_tokens),
            timings=Timings(stats.ttft_ms, stats.tpot_ms),
            stats=stats,
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

    def retry(self, **sampling: Any) -> Reply:
        """Take back the last answer and give another one to the same message; if that breaks off, the old one stays."""
        for _ in self.stream_retry(**sampling):
            pass
        assert self.last_reply is not None
        return self.last_reply

    def stream_retry(self, **sampling: Any) -> Iterator[str]:
        """Like ``retry``, piece by piece."""
        kept = self.fork()
        done = False
        try:
            yield from self.stream(self.undo()["content"], **sampling)
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
