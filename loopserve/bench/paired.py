"""Paired runs: everything that is compared runs once per round, A B A B, in one process, so that a slow moment of the
machine meets all sides alike and ratios can be taken round by round.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from loopserve.kernels.backend import Operation

Clock = Callable[[Callable[[], object]], float]
_LEAST_S = 2e-3  # a run is repeated until it takes about so long, or a tick of the clock would show
_MOST_REPEATS = 20


@dataclass(frozen=True)
class Runner:
    """Something to time. scale: what a measured time counts, for work that is a known part or multiple of what the row
    speaks of (a baseline on 2 of 8 heads counts 4 times).
    """

    run: Callable[[], object]
    scale: float = 1.0


def wall_clock(run: Callable[[], object]) -> float:
    """Seconds of one call on the CPU."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def paired_runs(runners: Mapping[str, Runner], runs: int, clock: Clock = wall_clock) -> dict[str, list[float]]:
    """Scaled seconds per runner, ``runs`` each, all runners in turn within a round. Runners should be warm."""
    found: dict[str, list[float]] = {name: [] for name in runners}
    for _ in range(runs):
        for name, each in runners.items():
            found[name].append(_seconds(each.run, clock) * each.scale)
    return found


def _seconds(run: Callable[[], object], clock: Clock) -> float:
    """Mean of as many calls as fill the least time a clock tells well; one, if that is long enough."""
    total, count = 0.0, 0
    while total < _LEAST_S and count < _MOST_REPEATS:
        total += clock(run)
        count += 1
    return total / count


@dataclass
class Watched:
    """What the operations did while watched: by operation, the implementations that served and the seconds spent."""

    served: dict[str, set[str]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def impl(self, *operations: str) -> str:
        """The implementations that served these operations (all by default), joined by ``+``."""
        names = {name for op in (operations or self.served) for name in self.served.get(op, ())}
        return "+".join(sorted(names))

    def shares(self, whole: float) -> dict[str, float]:
        """Share of ``whole`` seconds by operation."""
        return {op: seconds / whole for op, seconds in sorted(self.seconds.items())} if whole else {}


@contextmanager
def watched() -> Iterator[Watched]:
    """Watch which implementations the backend hands out and how long each operation takes. Never on during a timed run."""
    seen = Watched()
    call, implementation = Operation.__call__, Operation.implementation

    def timed(self: Operation, *args: Any, **options: Any) -> Any:
        started = time.perf_counter()
        try:
            return call(self, *args, **options)
        finally:
            seen.seconds[self.name] = seen.seconds.get(self.name, 0.0) + time.perf_counter() - started

    def noted(self: Operation, name: str) -> Callable[..., Any]:
        seen.served.setdefault(self.name, set()).add(name)
        return implementation(self, name)

    Operation.__call__, Operation.implementation = timed, noted  # type: ignore[method-assign]
    try:
        yield seen
    finally:
        Operation.__call__, Operation.implementation = call, implementation  # type: ignore[method-assign]
