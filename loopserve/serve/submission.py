"""Submit the answers to a request to the scheduler, and put their sessions back. Used by the model's thread only."""

from __future__ import annotations

import asyncio
import logging

from loopserve.api import Engine
from loopserve.core.engine.sampling import LogitsProcessor
from loopserve.core.engine.scheduler import Request
from loopserve.core.engine.session import Session
from loopserve.core.errors import CancelledTurn, CapacityError, InputError
from loopserve.serve.answer import Answer, Choice
from loopserve.serve.attention import AttendedParts
from loopserve.serve.errors import EngineFailure, invalid, stopping, unexpected
from loopserve.serve.kv_files import LoadedPairs
from loopserve.serve.live import LiveSessions
from loopserve.serve.records import Path
from loopserve.serve.settings import ServerSettings
from loopserve.serve.worker import Worker

_log = logging.getLogger("loopserve.serve")


class Submissions:
    """Begin, cancel and complete the answers of requests."""

    def __init__(self, engine: Engine, worker: Worker, live: LiveSessions, settings: ServerSettings) -> None:
        self._engine, self._worker, self._live, self._settings = engine, worker, live, settings

    def begin(self, answer: Answer, loaded: LoadedPairs | None, loop: asyncio.AbstractEventLoop) -> None:
        """Queue a request: one turn, or for several answers one prefill whose session is forked. loaded: see ``LiveSessions``."""
        if answer.closed:
            return
        answer.restarts = self._worker.restarts
        session = self._live.take(answer.match.path, answer.stack, loaded)
        answer.cached_tokens = session.cache.seen
        if answer.ask.n == 1:
            self._answer(answer, self._choice(answer, 0, session, loop))
            return

        def prefilled(request: Request) -> None:
            error = self._noted(request, session)
            if error is None and not answer.closed:
                answer.cached_tokens = session.turn_start
                try:
                    self._fork(answer, request, loop)
                    return
                except Exception as raised:
                    error = raised
            if request.error is None and request.turn is not None:
                request.turn.take_back()
            self._rest(answer, session)
            first = Choice(0, self._engine, session, answer.prompt, (), loop, answer.events)
            first.send(error or CapacityError("the request was closed"))

        try:
            answer.prefill = self._worker.scheduler.submit(session, answer.prompt.tokens, None, listener=prefilled)
        except BaseException:
            self._rest(answer, session)
            raise

    def _fork(self, answer: Answer, prefill: Request, loop: asyncio.AbstractEventLoop) -> None:
        """Answer a turn that was prefilled as often as asked for."""
        session, count = prefill.session, answer.ask.n
        assert prefill.turn is not None
        most = self._most_tokens(answer) or answer.ask.sampling.max_new_tokens
        try:
            self._worker.scheduler.make_space_for_forks(session, count, most)
        except InputError as error:
            raise invalid(f"n: {error}", "n") from None
        sessions = [session, *(session.fork() for _ in range(count - 1))]
        for index, each in enumerate(sessions):
            self._answer(answer, self._choice(answer, index, each, loop), prefill)

    def _choice(self, answer: Answer, index: int, session: Session, loop: asyncio.AbstractEventLoop) -> Choice:
        stop = answer.ask.sampling.stop
        choice = Choice(
            index,
            self._engine,
            session,
            answer.prompt,
            stop,
            loop,
            answer.events,
            most_calls=0 if not answer.ask.reads_calls else None if answer.ask.parallel_calls else 1,
        )
        answer.choices.append(choice)
        return choice

    def _answer(self, answer: Answer, choice: Choice, prefill: Request | None = None) -> None:
        sampling = answer.ask.sampling
        if answer.ask.attention_map:
            choice.attended = AttendedParts(self._engine, answer.match.path, answer.prompt)
            choice.session.attention_map = choice.attended.counts
        if choice.index and sampling.seed is not None:
            sampling = sampling.model_copy(update={"seed": (sampling.seed + choice.index) % (1 << 63)})

        def progressed(request: Request) -> None:
            error = self._noted(request, choice.session)
            if error is not None:
                self._rest(answer, choice.session)
                choice.send(error)
                return
            if not choice.started:
                choice.started = True
                if prefill is None:
                    answer.cached_tokens = (
                        choice.session.turn_start
                    )  # a queued session may have been released meanwhile
            choice.progressed(request)

        logits = prefill.turn.logits if prefill is not None and prefill.turn is not None else None
        try:
            choice.request = self._worker.scheduler.submit(
                choice.session,
                answer.prompt.tokens if logits is None else (),
                sampling,
                listener=progressed,
                max_new_tokens=self._most_tokens(answer),
                logits_processors=[*answer.ask.logits_processors, *self._grammar(answer)],
                logits=logits,
                **choice.options,
            )
        except BaseException:
            choice.session.attention_map = None
            if prefill is None:
                self._rest(answer, choice.session)
            raise

    def _noted(self, request: Request, session: Session) -> BaseException | None:
        """Return what ended a request, for its client. After an error that nobody expected, the session's pairs are not used again."""
        error = request.error
        if isinstance(error, CancelledTurn):  # not by its client, who reads nothing any more
            return EngineFailure() if self._worker.alive else stopping()
        if error is not None and unexpected(error):
            _log.error("a turn failed and is taken back", exc_info=error)
            self._worker.passed(error)
            session.close()
            return EngineFailure()
        if error is None:
            self._worker.passed(None)
        return error

    def _grammar(self, answer: Answer) -> list[LogitsProcessor]:
        """Return the processor of one answer that must be of a form. It has a state, so each answer has its own."""
        grammar = answer.ask.grammar
        return [] if grammar is None else [grammar.processor(answer.prompt.text)]

    def _most_tokens(self, answer: Answer) -> int | None:
        """Return the longest answer where the request gives none: the server's default, or what is left of the window."""
        if "max_new_tokens" in answer.ask.sampling.model_fields_set:
            return None
        window, most = self._engine.token_engine.model.max_positions, self._settings.default_max_tokens
        return most if window is None else max(1, min(most, window - answer.prompt_tokens))

    def cancel(self, answer: Answer) -> None:
        """Take back the answers that are not committed: queued, under way or complete."""
        answer.closed = True
        if answer.prefill is not None:
            self._worker.scheduler.cancel(answer.prefill)  # its listener puts the session back
        for choice in answer.choices:
            request = choice.request
            if request is None or choice.committed or request.error is not None:
                continue
            if not request.done.is_set():
                self._worker.scheduler.cancel(request)
            elif request.turn is not None:
                request.turn.take_back()
                self._rest(answer, choice.session)

    def complete(self, answer: Answer, choice: Choice, path: Path) -> None:
        """Let the session of a committed answer rest at its new turn. InputError if its tokens are not those of the turn."""
        session = choice.session
        session.attention_map = None
        del session.tokens[len(path.tokens) :]
        if session.tokens != path.tokens:
            session.close()
            raise InputError("an answer's tokens are not those of its session: it is computed anew")
        self._live.put(session, path, answer.stack)

    def _rest(self, answer: Answer, session: Session) -> None:
        """Put the session of an answer that was not committed back to where it was."""
        if session.busy or session.closed:
            return
        path = answer.match.path
        session.attention_map = None
        session.go_back(len(path.tokens))
        self._live.put(session, path, answer.stack)
