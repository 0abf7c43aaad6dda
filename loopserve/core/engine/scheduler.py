"""Serve many sessions at once: continuous batching with chunked prefill, a bounded queue and a limit on memory.

Knows no transport. ``step`` runs one forward pass; whoever calls it owns the model's passes. ``submit`` and ``cancel`` may be
called from any thread.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from loopserve.core.engine.engine import TokenEngine
from loopserve.core.engine.ledger import Ledger
from loopserve.core.engine.pace import Pace
from loopserve.core.engine.sampling import Choose, SamplingConfig
from loopserve.core.engine.session import Session
from loopserve.core.engine.turn import Turn
from loopserve.core.errors import CancelledTurn, CapacityError, ConfigError, InputError

_log = logging.getLogger("loopserve")


class Request:
    """Follow one turn through the scheduler."""

    def __init__(
        self,
        session: Session,
        new_tokens: Sequence[int],
        max_new_tokens: int,
        begin: Callable[[], Turn],
        listener: Callable[[Request], None] | None,
        prefilled: bool = False,
    ) -> None:
        """begin: begins the turn. listener: called after each pass that brought tokens, and at the end. prefilled: the turn goes on
        from a prefill, whose pairs its session holds.
        """
        self.session = session
        self.prefilled = prefilled
        self.new_tokens = list(new_tokens)
        self.max_new_tokens = max_new_tokens
        self.turn: Turn | None = None
        self.error: BaseException | None = None
        self.cancelled = False
        self.done = threading.Event()
        self._begin, self._listener = begin, listener

    @property
    def output(self) -> list[int]:
        """The tokens so far."""
        return self.turn.output if self.turn is not None else []

    def result(self, timeout: float | None = None) -> list[int]:
        """Wait for the turn's end; return its tokens or raise what ended it. TimeoutError after ``timeout`` seconds."""
        if not self.done.wait(timeout):
            raise TimeoutError("the turn is still under way")
        if self.error is not None:
            raise self.error
        return self.output

    def begin(self) -> None:
        """Begin the turn."""
        self.turn = self._begin()

    def finish(self, error: BaseException | None) -> None:
        """Say that the turn is over."""
        if error is not None:
            _log.debug("a turn ended with an error", exc_info=error)
        each = error
        while each is not None:  # the frames of its traceback would keep the session's store alive
            each.__traceback__ = None
            each = each.__cause__ or each.__context__
        self.error = error
        if self.turn is not None:
            self.turn.error = None
        self.done.set()

    def notify(self) -> None:
        """Call the listener. What it raises is logged: it is no fault of the turns."""
        if self._listener is not None:
            try:
                self._listener(self)
            except Exception:
                _log.exception("the listener of a request failed")


class Scheduler:
    """Run the turns of many sessions of one engine.

    A pass holds one token of every turn that decodes, and prompt tokens up to ``max_num_batched_tokens`` in all. Half of these go to
    the oldest prompt, so that none waits for ever; the rest goes to the shortest prompts first, so that a short message does not
    wait behind a long one. While requests overlap, ``max_pass_steps`` bounds the time of a pass as well (see ``Pace``).
    """

    def __init__(
        self,
        engine: TokenEngine,
        *,
        max_sessions: int = 16,
        max_num_batched_tokens: int = 512,
        max_queued: int = 256,
        kv_memory: int | None = None,
        max_pass_steps: float | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """max_sessions: turns under way at once. max_num_batched_tokens: tokens of a pass. max_queued: requests that may wait.
        kv_memory: bytes of stores, active sets and policy states of all sessions; None = no limit. max_pass_steps: how many times
        as long as one without prompt tokens a pass may take while requests overlap; None = no bound, so that the pieces of a prompt
        do not depend on time. ConfigError for values below 1.
        """
        for name, value in (
            ("max_sessions", max_sessions),
            ("max_num_batched_tokens", max_num_batched_tokens),
            ("max_pass_steps", 1 if max_pass_steps is None else max_pass_steps),
        ):
            if not 1 <= value < math.inf:
                raise ConfigError(f"{name} must be at least 1 and finite, got {value}")
        if max_queued < 0:
            raise ConfigError(f"max_queued must be at least 0, got {max_queued}")
        self.engine = engine
        self.max_sessions, self.max_num_batched_tokens, self.max_queued = (
            max_sessions,
            max_num_batched_tokens,
            max_queued,
        )
        self.ledger = Ledger(kv_memory, engine.model.dtype.itemsize, lambda: engine.sessions)
        self._pace = Pace(max_num_batched_tokens, max_pass_steps, clock)
        self._waiting: deque[Request] = deque()
        self._running: list[Request] = []
        self._changed = threading.Condition()

    # From any thread.

    def submit(
        self,
        session: Session,
        new_tokens: Sequence[int],
        sampling: SamplingConfig | Choose | None,
        stop_ids: frozenset[int] = frozenset(),
        max_new_tokens: int | None = None,
        listener: Callable[[Request], None] | None = None,
        **options: Any,
    ) -> Request:
        """Queue a turn. listener: called, by the thread that calls ``step``, after each pass that brought tokens or the end.
        options: further ones of ``TokenEngine.begin``.

        Raises InputError for a turn that can never be served and CapacityError if the queue is full.
        """
        options |= {"stop_ids": stop_ids, "max_new_tokens": max_new_tokens}
        most = self.engine.plan(session, new_tokens, sampling, **options).max_new_tokens
        needed = self.ledger.needed(session, len(new_tokens), most)
        if self.ledger.limit is not None and needed > self.ledger.limit:
            raise InputError(
                f"the turn may need {needed} bytes of KV memory, the limit is {self.ledger.limit}: shorten the message, lower "
                "max_new_tokens, or raise the limit"
            )
        options["max_new_tokens"] = most
        request = Request(
            session,
            new_tokens,
            most,
            lambda: self.engine.begin(session, new_tokens, sampling, **options),
            listener,
            prefilled=options.get("logits") is not None,
        )
        with self._changed:
            if any(each.session is session for each in [*self._waiting, *self._running]):
                raise InputError("a turn of this session is under way or queued: wait for its end or cancel it first")
            if len(self._waiting) + len(self._running) >= self.max_sessions + self.max_queued:
                raise CapacityError(f"{len(self._waiting)} requests are waiting already: try again later")
            if request.prefilled:  # before those that have no pairs: one that waits for memory would wait for ours
                self._waiting.insert(sum(each.prefilled for each in self._waiting), request)
            else:
                self._waiting.append(request)
            self._changed.notify_all()
        return request

    def cancel(self, request: Request) -> None:
        """End a turn at the next pass, queued or under way, and take it back. A turn that is over stays as it is."""
        with self._changed:
            request.cancelled = not request.done.is_set()
            self._changed.notify_all()

    def wait_for_work(self, timeout: float | None = None) -> bool:
        """Wait until a request is there; return whether one is."""
        with self._changed:
            return self._changed.wait_for(lambda: bool(self._waiting or self._running), timeout)

    @property
    def waiting(self) -> int:
        """Requests that wait to begin."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Turns under way."""
        return len(self._running)

    # From the thread that runs the model.

    def make_space_for_forks(self, session: Session, count: int, max_new_tokens: int) -> None:
        """Make space for ``count`` answers to a turn that is prefilled: forks of its session, answered one by one if need be.

        Raises InputError if their pairs never fit the limit beside what one answer needs, and CapacityError if they do not now: each
        answer that waits keeps its pairs, so one of them must always have what it needs to go on.
        """
        limit = self.ledger.limit
        if limit is None:
            return
        held = session.allocated_bytes
        growth = max(0, self.ledger.needed(session, 0, max_new_tokens) - held)
        if count * held + growth > limit:
            raise InputError(
                f"{count} answers to one request may need {count * held + growth} bytes of KV memory, the limit is {limit}: ask for "
                "fewer, shorten the conversation, lower max_new_tokens, or raise the limit"
            )
        with self._changed:
            waiting = [each for each in self._waiting if each.prefilled]
        kept = sum(each.session.allocated_bytes for each in waiting)
        for each in waiting:
            needed = self.ledger.needed(each.session, len(each.new_tokens), each.max_new_tokens)
            growth = max(growth, needed - each.session.allocated_bytes)
        if kept + count * held + growth > limit or not self.ledger.make_space(count * held, session):
            raise CapacityError(
                f"{count} answers to one request do not fit the KV memory now: try again later, or ask for fewer"
            )

    def step(self) -> bool:
        """Run one pass; return whether there was anything to do."""
        self._drop_cancelled()
        self._admit()
        plan = self._plan()
        if not plan:
            if self._waiting:  # for a session that another thread uses
                time.sleep(0.001)
            return bool(self._waiting)
        started, waiting = self._pace.clock(), sum(turn.waiting for turn in plan)
        try:
            self.engine.run_pass(list(plan), list(plan.values()))
        except BaseException:  # Ctrl-C in mid-pass: the sessions hold parts of it
            for request in list(self._running):
                self._end(request, _interrupted(request))
            raise
        computed = waiting - sum(turn.waiting for turn in plan)
        if computed > 0 or not waiting:  # a turn that was set to be computed anew says nothing of a step
            self._pace.passed(computed, self._pace.clock() - started)
        progressed = [each for each in self._running if each.output]
        for request in list(self._running):
            assert request.turn is not None
            if request.turn.finished:
                self._end(request, request.turn.error)
        for request in progressed:
            if not request.done.is_set():
                request.notify()
        return True

    def run_until_idle(self) -> None:
        """Run passes until no request is left."""
        while self.step():
            pass

    def close(self) -> None:
        """Cancel every request and end it."""
        for request in [*self._waiting, *self._running]:
            request.cancelled = True
        self._drop_cancelled()

    def abandon(self, error: Callable[[], BaseException]) -> None:
        """End every request with an error of its own, also after a failure in the midst of ``step``. Use another scheduler then.

        A session whose turn cannot be taken back is closed.
        """
        for request in [*self._waiting, *self._running]:
            try:
                if request.turn is not None:
                    request.turn.close()
            except Exception:
                _log.exception("a turn could not be taken back: its session is closed")
                request.session.close()
            self.ledger.settle(request.session)
            request.finish(error())
            request.notify()
        self._waiting.clear()
        self._running.clear()

    def _drop_cancelled(self) -> None:
        with self._changed:
            gone = [each for each in [*self._waiting, *self._running] if each.cancelled]
        for request in gone:
            self._end(request, CancelledTurn("the turn was cancelled and is taken back"))

    def _end(self, request: Request, error: BaseException | None) -> None:
        """Take a request out; a turn that is not finished is taken back."""
        if request.turn is not None:
            request.turn.close()
        self.ledger.settle(request.session)
        with self._changed:
            if request in self._waiting:
                self._waiting.remove(request)
            if request in self._running:
                self._running.remove(request)
        request.finish(error)
        request.notify()

    def _admit(self) -> None:
        """Begin waiting turns in their order as far as sessions and memory allow.

        A turn that is prefilled already comes before the others. Nobody else overtakes one that waits for memory.
        """
        while self._waiting and len(self._running) < self.max_sessions:
            request = self._waiting[0]
            needed = self.ledger.needed(request.session, len(request.new_tokens), request.max_new_tokens)
            if not self.ledger.admit(request.session, needed):
                return
            with self._changed:
                self._waiting.remove(request)
                self._running.append(request)
            try:
                request.begin()
            except Exception as error:
                self._end(request, error)
            except BaseException:
                self._end(request, _interrupted(request))
                raise
            else:
                if (
                    request.turn is not None and request.turn.finished
                ):  # its only token came with the logits of a prefill
                    self._end(request, request.turn.error)

    def _plan(self) -> dict[Turn, int | None]:
        """Return the turns of the next pass, each with the prompt tokens it may compute (None for one that decodes)."""
        turns = [each.turn for each in self._running if each.turn is not None]
        plan: dict[Turn, int | None] = {turn: None for turn in turns if turn.waiting == 0}
        prompts = [turn for turn in turns if turn.waiting > 0]
        beside = self._pace.prompt_tokens(len(self._running) + len(self._waiting))
        left = max(1, min(beside, self.max_num_batched_tokens - len(plan)))
        shares = dict.fromkeys(prompts, 0)
        if prompts:
            shares[prompts[0]] = min(prompts[0].waiting, -(-left // 2))
            left -= shares[prompts[0]]
        for turn in sorted(prompts, key=lambda turn: turn.waiting):
            more = min(turn.waiting - shares[turn], left)
            shares[turn] += more
            left -= more
        return plan | {turn: share for turn, share in shares.items() if share}


def _interrupted(request: Request) -> BaseException | None:
    """Return what ended a turn when the thread that runs the model was interrupted."""
    if request.turn is not None and request.turn.finished:
        return request.turn.error
    return CancelledTurn("the engine was interrupted, and the turn is taken back")
