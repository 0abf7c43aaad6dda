"""Time several sides in paired runs: each runs once per round, A B A B, in one process.

A slow moment of the machine then affects all sides alike, and ratios are taken round by round.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from loopserve.core.policy.interfaces import DecodeCompressor
from loopserve.kernels.backend import Operation

Clock = Callable[[Callable[[], object]], float]
_LEAST_S = 2e-3  # seconds: shorter calls are repeated, since the clock's resolution would show
_MOST_REPEATS = 20
_MOMENTS = ("before_attention", "after_attention", "after_forward")  # when a compressor acts


@dataclass(frozen=True)
class Runner:
    """Hold a timed call. scale: factor from measured to reported time, for work that is a known part or multiple.

    A baseline on 2 of 8 heads has scale 4.
    """

    run: Callable[[], object]
    scale: float = 1.0


def wall_clock(run: Callable[[], object]) -> float:
    """Return seconds of one call on the CPU."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def paired_runs(runners: Mapping[str, Runner], runs: int, clock: Clock = wall_clock) -> dict[str, list[float]]:
    """Return scaled seconds per runner, ``runs`` each, all runners in turn within a round. Runners should be warm."""
    found: dict[str, list[float]] = {name: [] for name in runners}
    for _ in range(runs):
        for name, each in runners.items():
            found[name].append(_seconds(each.run, clock) * each.scale)
    return found


def _seconds(run: Callable[[], object], clock: Clock) -> float:
    """Return the mean over as many calls as fill the minimum measurable time; one call if that is long enough."""
    total, count = 0.0, 0
    while total < _LEAST_S and count < _MOST_REPEATS:
        total += clock(run)
        count += 1
    return total / count


@dataclass
class Watched:
    """Hold, by operation, the implementations used, and by operation and policy the seconds spent in it, nested ones excluded."""

    served: dict[str, set[str]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    _inner: list[float] = field(default_factory=list)

    def impl(self, *operations: str) -> str:
        """Return the implementations of these operations (all by default), joined by ``+``."""
        names = {name for op in (operations or self.served) for name in self.served.get(op, ())}
        return "+".join(sorted(names))

    def shares(self, whole: float) -> dict[str, float]:
        """Return the share of ``whole`` seconds by operation."""
        return {op: seconds / whole for op, seconds in sorted(self.seconds.items())} if whole else {}

    def clocked(self, name: str, run: Callable[[], Any]) -> Any:
        """Return the result of ``run`` and add its time to ``name``."""
        started = time.perf_counter()
        self._inner.append(0.0)
        try:
            return run()
        finally:
            spent = time.perf_counter() - started
            self.seconds[name] = self.seconds.get(name, 0.0) + spent - self._inner.pop()
            if self._inner:
                self._inner[-1] += spent


@contextmanager
def watched(policies: Iterable[type[DecodeCompressor[Any]]] = ()) -> Iterator[Watched]:
    """Record the implementations that the backend returns, and the time of operations and of the policies' own code.

    It is never active during a timed run.
    """
    seen = Watched()
    call, implementation = Operation.__call__, Operation.implementation

    def timed(self: Operation, *args: Any, **options: Any) -> Any:
        return seen.clocked(self.name, lambda: call(self, *args, **options))

    def noted(self: Operation, name: str) -> Callable[..., Any]:
        seen.served.setdefault(self.name, set()).add(name)
        return implementation(self, name)

    with ExitStack() as undo:
        undo.enter_context(_replaced(Operation, "__call__", timed))
        undo.enter_context(_replaced(Operation, "implementation", noted))
        for policy in set(policies):
            for method in _MOMENTS:
                undo.enter_context(_replaced(policy, method, _clocked_method(seen, getattr(policy, method))))
        yield seen


def _clocked_method(seen: Watched, method: Callable[..., Any]) -> Callable[..., Any]:
    def timed(*args: Any, **options: Any) -> Any:
        return seen.clocked("policy", lambda: method(*args, **options))

    return timed


@contextmanager
def _replaced(owner: type, name: str, value: object) -> Iterator[None]:
    """Replace a class's attribute in a block, and restore inheritance after it for an inherited one."""
    before = owner.__dict__.get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if before is None:
            delattr(owner, name)
        else:
            setattr(owner, name, before)
