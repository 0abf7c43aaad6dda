"""Own the model: one thread runs the scheduler's passes and, between them, what others ask it to do with sessions."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

import torch

from loopserve.api import Engine
from loopserve.core.engine.scheduler import Scheduler
from loopserve.core.errors import CapacityError
from loopserve.serve.errors import EngineFailure, invalid, stopping, too_many
from loopserve.serve.settings import ServerSettings

_log = logging.getLogger("loopserve.serve")
T = TypeVar("T")
_MOST_FAILURES = 3  # passes that may fail one after another before the engine counts as broken


class Worker:
    """Run one engine in a thread of its own. Sessions are touched in that thread only, through ``call``.

    An error that nobody expected, whatever its kind, ends all requests with EngineFailure. The scheduler is replaced then, and the
    thread goes on.
    """

    def __init__(self, engine: Engine, settings: ServerSettings) -> None:
        self.engine = engine
        self._settings = settings
        self.scheduler = self._new_scheduler()
        self.on_restart: Callable[[], None] = lambda: None  # drops what is left of sessions and answers
        self.restarts = 0
        self.beyond_repair = False  # the device is in a state that only another process gets it out of
        self.failures = 0  # passes that failed since one succeeded
        self._failed_at = 0.0  # by the monotonic clock
        self._counted = False  # whether the pass under way was counted as failed; it may end many requests
        self._most = settings.max_num_seqs + settings.max_queued
        self._calls: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._changed = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="loopserve model", daemon=True)
        self.admitted = 0  # answers that were let in and are not over
        self._by_tenant: Counter[str] = Counter()
        self.rejected = 0

    def _new_scheduler(self) -> Scheduler:
        return Scheduler(
            self.engine.token_engine,
            max_sessions=self._settings.max_num_seqs,
            max_num_batched_tokens=self._settings.max_num_batched_tokens,
            max_pass_steps=self._settings.max_pass_steps,
            max_queued=self._settings.max_queued,
            kv_memory=self._settings.kv_cache_memory,
        )

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Cancel what is under way and end the thread. May be called twice."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread.ident is not None:
            self._thread.join()

    @property
    def alive(self) -> bool:
        """Return whether the model can be asked."""
        return self._thread.is_alive() and not self._stopping

    @property
    def healthy(self) -> bool:
        """Return whether the model can be asked and its last passes did not all fail."""
        return self.alive and not self.beyond_repair and self.failures < _MOST_FAILURES

    @property
    def ready(self) -> bool:
        """Return whether requests are worth sending: ``healthy``, or broken for so long that one may try whether it still is."""
        waited = time.monotonic() - self._failed_at >= self._settings.ready_again_s
        return self.healthy or (waited and self.alive and not self.beyond_repair)

    def admit(self, answers: int, tenant: str) -> None:
        """Let answers in, to be given back with ``leave``.

        Raises CapacityError at once if as many as allowed are waiting, ApiError (429) if the tenant alone has too many, and ApiError
        (400) for a request of more answers than are ever let in.
        """
        most = self._settings.max_requests_per_key
        ever = self._most if most is None else min(most, self._most)
        if answers > ever:
            raise invalid(f"n: at most {ever} answers at once are let in here", "n")
        self.check_space(tenant, answers)
        self.admitted += answers
        self._by_tenant[tenant] += answers

    def check_space(self, tenant: str, answers: int = 1) -> None:
        """Raise ApiError (429) if the tenant has too many answers, CapacityError if so many more would not be let in now.

        The tenant's own limit comes first: waiting for others would not help it.
        """
        most, held = self._settings.max_requests_per_key, self._by_tenant.get(tenant, 0)
        if most is not None and held + answers > most:
            self.rejected += 1
            raise too_many(f"{held} requests of this key are under way or waiting already")
        if self.admitted + answers > self._most:
            self.rejected += 1
            raise CapacityError(f"{self.admitted} requests are under way or waiting already: try again later")

    def leave(self, answers: int, tenant: str) -> None:
        """Say that answers are over."""
        self.admitted -= answers
        self._by_tenant[tenant] -= answers
        if not self._by_tenant[tenant]:
            del self._by_tenant[tenant]

    def call(self, work: Callable[[], T]) -> Future[T]:
        """Have ``work`` done by the model's thread, between two passes."""
        future: Future[T] = Future()
        with self._changed:
            if not self.alive:
                future.set_exception(stopping())
                return future
            self._calls.append((future, work))
            self._changed.notify()
        return future

    async def acall(self, work: Callable[[], T]) -> T:
        """Like ``call``, from the event loop. The work is done even if the waiting task is cancelled."""
        return await asyncio.shield(asyncio.wrap_future(self.call(work)))

    def _run(self) -> None:
        broken = False
        while True:  # an error may come from anywhere, a restart included
            try:
                if broken:
                    self._restart()
                    broken = False
                self._serve()
                return
            except BaseException as error:
                broken = True
                self._look_at(error)
                _log.critical("the model's thread failed: the engine is restarted", exc_info=error)

    def _serve(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._calls or self._stopping or self._busy)
                stopping = self._stopping
            self._counted = False
            for _ in range(len(self._calls)):  # one by one: those behind a failure are done afterwards
                _do(*self._calls[0])
                self._calls.popleft()
            if stopping:
                self.scheduler.close()
                return
            if self._busy:
                self.scheduler.step()

    def _restart(self) -> None:
        """End every request, drop every session in memory, and begin with a scheduler of its own."""
        self.restarts += 1
        self._count(failed=True)
        if self._calls and (self._calls[0][0].done() or self._calls[0][0].running()):
            future, _ = self._calls.popleft()  # the failure came in the midst of it
            if not future.done():
                future.set_exception(EngineFailure())
        broken, self.scheduler = self.scheduler, self._new_scheduler()
        try:
            broken.abandon(EngineFailure)
            self.on_restart()
        except Exception:
            _log.exception("some requests were not ended after a failure")

    def passed(self, error: BaseException | None) -> None:
        """Take note of how the pass of a request ended: None, or an error that nobody expected.

        A pass is one failure at most, however many requests it ends.
        """
        self._count(failed=error is not None)
        if error is not None:
            self._look_at(error)

    def _count(self, *, failed: bool) -> None:
        if not failed:
            self.failures = 0
        elif not self._counted:
            self.failures += 1
            self._failed_at = time.monotonic()
            self._counted = True

    def _look_at(self, error: BaseException) -> None:
        """Note an error after which every later call of the device fails too. Running out of its memory is none."""
        self.beyond_repair |= isinstance(error, torch.AcceleratorError) and not isinstance(
            error, torch.OutOfMemoryError
        )

    @property
    def _busy(self) -> bool:
        return bool(self.scheduler.waiting or self.scheduler.running)


def _do(future: Future[Any], work: Callable[[], Any]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(work())
    except Exception as error:
        future.set_exception(error)
    except BaseException:
        future.set_exception(EngineFailure())
        raise
