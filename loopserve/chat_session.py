"""A conversation in text with an engine: turns, undo, retry, fork, save."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any
from uuid import uuid4
from weakref import WeakValueDictionary

from loopserve.core.engine.sampling import FinishReason, LogitsProcessor, SamplingConfig
from loopserve.core.engine.session import Session
from loopserve.core.engine.stats import TurnStats
from loopserve.core.engine.turn import Turn
from loopserve.core.errors import InputError
from loopserve.models.answer_text import AnswerText
from loopserve.models.chat import Answered, Message, Prompt, StreamDecoder, as_messages, writable
from loopserve.models.logprobs import TokenLogprob, token_logprobs
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

    text: str  # the answer itself, without what the model thought before it, and without a stop string
    token_ids: tuple[int, ...]  # up to and including a stop token, or the token that completed a stop string
    usage: Usage
    timings: Timings
    stats: TurnStats
    finish_reason: FinishReason  # stop: a stop token or stop string; length: max_new_tokens or the model's window
    stop_string: str | None = None  # the one that ended the answer
    logprobs: tuple[TokenLogprob, ...] | None = None  # one entry per token of token_ids, where asked for
    reasoning: str | None = None  # of a reasoning block or of other channels than the final one; None: none was written


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
    ) -> None:
        """messages: a conversation to go on with. token_ids: tokens of answers among them, by number of the message."""
        self.engine = engine
        begun = list(messages or [])
        if system is not None:
            if not isinstance(system, str) or not writable(system):
                raise InputError("the system message is no text; give it as UTF-8")
            begun.insert(0, {"role": "system", "content": system})
        self.last_reply: Reply | None = None
        self._transcript = Transcript(engine.tokenizer, begun, given_tokens=token_ids or {})
        self._session: Session | None = engine.token_engine.session()
        self._rewrites = False  # the template was seen to rewrite earlier turns

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
    def messages(self) -> list[Message]:
        """Return the messages so far; an answer's reasoning stands beside it as ``reasoning_content``."""
        return self._transcript.messages

    @property
    def turns(self) -> list[TurnStats]:
        """Return the figures of the turns that were answered here."""
        self._open  # noqa: B018  # raises for a closed session
        return [turn.stats for turn in self._transcript.turns]

    @property
    def _open(self) -> Session:
        if self._session is None:
            raise InputError("the session is closed; open a new one with engine.session()")
        return self._session

    def send(self, text: str, *, logits_processors: Sequence[LogitsProcessor] = (), **options: Any) -> Reply:
        """Say something, get the whole answer. The arguments are those of ``stream``."""
        return self._whole(self.stream(text, logits_processors=logits_processors, **options))

    def stream(self, text: str, *, logits_processors: Sequence[LogitsProcessor] = (), **options: Any) -> Iterator[str]:
        """Give the answer piece by piece, without its reasoning; ``last_reply`` holds the whole once it is over.

        options: those of ``SamplingConfig``, and ``sampling`` to choose other defaults than the engine's (see ``Engine``).
        logits_processors: functions from ``(input_ids [1, T], scores [1, V])`` to scores, as those of transformers. No piece
        holds a part of a stop string. Raises ConfigError for a wrong option, InputError for a message that cannot be asked.
        """
        config = self.engine.sampling_config(options)
        if not isinstance(text, str):
            raise InputError(f"a message is text, not {type(text).__name__}")
        return self._begin(lambda: [*self.messages, {"role": "user", "content": text}], config, logits_processors)

    def complete(
        self, messages: Sequence[Message], *, logits_processors: Sequence[LogitsProcessor] = (), **options: Any
    ) -> Reply:
        """Answer a whole conversation, given as the chat API has it, and go on from what this session holds of it.

        messages: dictionaries of role and content, the last one a user's. Compared message by message: what both have in common
        is not computed again, where they differ the session goes back to the last common turn. Raises InputError for what is no
        message. The other arguments are those of ``stream``.
        """
        return self._whole(self.stream_complete(messages, logits_processors=logits_processors, **options))

    def stream_complete(
        self, messages: Sequence[Message], *, logits_processors: Sequence[LogitsProcessor] = (), **options: Any
    ) -> Iterator[str]:
        """Like ``complete``, piece by piece."""
        config = self.engine.sampling_config(options)
        given = as_messages(messages)

        def asked() -> list[Message]:
            common = self._transcript.common(given)
            return [*self.messages[:common], *given[common:]]

        return self._begin(asked, config, logits_processors)

    def _whole(self, pieces: Iterator[str]) -> Reply:
        for _ in pieces:
            pass
        assert self.last_reply is not None
        return self.last_reply

    def _begin(
        self, asked: Callable[[], list[Message]], config: SamplingConfig, processors: Sequence[LogitsProcessor]
    ) -> Iterator[str]:
        self._open.require_rest()
        prompt = self._transcript.prompt(asked())  # a message that cannot be asked is refused at once
        return self._answer(asked, self.messages, prompt, config, processors)

    def _answer(
        self,
        ask: Callable[[], list[Message]],
        held: list[Message],
        prompt: Prompt,
        config: SamplingConfig,
        processors: Sequence[LogitsProcessor],
    ) -> Iterator[str]:
        engine, session = self.engine, self._open
        session.require_rest()
        asked = ask()
        if held is not self.messages:  # other turns have been held since the stream was opened
            prompt = self._transcript.prompt(asked)
        longest = self._longest_answer(prompt, config)
        reused, history_ms = self._prepare(session, asked, prompt)
        depth = len(session.turns)
        said = AnswerText(engine.tokenizer, config.stop, StreamDecoder(engine.tokenizer, prompt.text))
        turn = engine.token_engine.begin(
            session,
            prompt.tokens[len(session.tokens) :],
            config,
            stop_ids=engine.stop_ids,
            stop_check=said.push,
            max_new_tokens=longest,
            logits_processors=processors,
        )
        for _ in engine.token_engine.finish(turn):
            if turn.finished:
                said.close()
            if piece := said.take():
                yield piece
        answer = engine.tokenizer.read_answer(turn.output, prompt.text)
        if said.stop_string is not None:
            answer = replace(answer, text=said.text)
        answered = Answered(len(asked), prompt, answer, tuple(turn.output))
        self._transcript.add(asked, TranscriptTurn(answered, session.stats, depth))
        self.last_reply = self._reply(turn, answered, said.stop_string, reused, history_ms)

    def _reply(self, turn: Turn, answered: Answered, stop_string: str | None, reused: int, history_ms: float) -> Reply:
        stats = turn.session.stats
        assert turn.finish_reason is not None
        return Reply(
            text=answered.answer.text.strip(),
            token_ids=answered.tokens,
            usage=Usage(len(answered.prompt.tokens) - reused, reused, stats.output_tokens),
            timings=Timings(stats.ttft_ms + history_ms, stats.tpot_ms),
            stats=stats,
            finish_reason=turn.finish_reason if stop_string is None else FinishReason.STOP,
            stop_string=stop_string,
            logprobs=None if turn.logprobs is None else token_logprobs(self.engine.tokenizer, turn.logprobs),
            reasoning=answered.answer.reasoning,
        )

    def _prepare(self, session: Session, asked: list[Message], prompt: Prompt) -> tuple[int, float]:
        """Bring the session to the beginning of a prompt; return (tokens that it holds of it, ms spent on earlier turns).

        Under a template that rewrites earlier turns, they are computed as a turn of their own, so that the next rewriting goes
        back to there and not to the beginning.
        """
        held, depth = len(session.tokens), len(session.turns)
        bring_to(session, prompt.tokens)
        if len(session.turns) < depth and self._transcript.common(asked) == len(self.messages):
            self._rewrites = True
        reused = min(held, len(session.tokens))
        if not self._rewrites or prompt.history is None or prompt.history <= reused:
            return reused, 0.0
        self.engine.token_engine.prefill(session, prompt.tokens[reused : prompt.history])
        return reused, session.stats.ttft_ms

    def _longest_answer(self, prompt: Prompt, config: SamplingConfig) -> int:
        """Return the longest answer in tokens: the default is cut to what the model's window leaves, a given length is not.

        Raises InputError before anything is taken back for a prompt that does not fit.
        """
        limit, length = self.engine.token_engine.model.max_positions, len(prompt.tokens)
        most = config.max_new_tokens
        if limit is None:
            return most
        if length + 1 > limit:
            raise InputError(
                f"the conversation would be {length + 1} tokens long, the model takes {limit}: shorten the message, "
                "undo a turn, or start a new session"
            )
        if length + most <= limit:
            return most
        if "max_new_tokens" in config.model_fields_set:
            raise InputError(
                f"max_new_tokens={most} does not fit: {limit - length} tokens are left of the model's {limit}"
            )
        return limit - length

    def undo(self) -> Message:
        """Take back the last turn, also one that was given at the beginning; returns the user's message of it."""
        session = self._open
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
        kept = self.fork()
        try:
            return self.send(self.undo()["content"], **options)
        except BaseException:
            self._become(kept)
            raise

    def fork(self) -> ChatSession:
        """An independent copy of the conversation, to try two answers."""
        other = ChatSession(self.engine)
        other._become(self)
        other._session = self._open.fork()
        return other

    def __deepcopy__(self, memo: dict[int, Any]) -> ChatSession:
        return self.fork()

    def __reduce__(self) -> tuple[Callable[..., ChatSession], tuple[str, Transcript, Reply | None]]:
        """Pickle the conversation without engine and cache, which is computed anew with the next message."""
        self._open.require_rest()
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
        """
        body = {"version": 1, "stack": self.engine.stack.describe(), "messages": self._transcript.saved()}
        try:
            Path(path).write_text(json.dumps(body, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        except OSError as error:
            raise InputError(f"{path}: cannot save the conversation ({error.strerror})") from error


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
