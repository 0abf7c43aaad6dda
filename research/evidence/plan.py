"""How much of each experiment is run: sizes for the page, and small ones that show it runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from research.evidence import (
    attention_map,
    both,
    concentration,
    coverage,
    goal,
    moving,
    overlap,
    position,
    prefill,
    sensitivity,
    turns,
)
from research.evidence.both import TASKS
from research.evidence.moving import INTERVALS
from research.evidence.talks import POSITIONS
from research.evidence.units import Unit


@dataclass(frozen=True)
class Sizes:
    """Lengths in tokens, and dialogues per cell of each experiment's table."""

    tokens: int = 2000
    lengths: Mapping[int, int] = field(default_factory=lambda: {512: 4, 1024: 4, 2048: 3, 4096: 2})
    overlap: int = 6
    coverage: int = 4
    position: int = 16
    shares: Sequence[float] = (0.05, 0.10, 0.15, 0.20)
    plain: int = 8
    moving: int = 16
    long: int = 4
    intervals: Sequence[int] = INTERVALS
    turns: int = 24
    turn_shares: Sequence[float] = (0.20, 0.40)
    prefill: int = 10
    both: int = 8
    tasks: Sequence[str] = tuple(TASKS)
    sensitivity: int = 12
    goal: int = 48


FULL = Sizes()
QUICK = Sizes(
    tokens=800,
    lengths={256: 1, 512: 1},
    overlap=1,
    coverage=1,
    position=1,
    shares=(0.10, 0.20),
    plain=1,
    moving=1,
    long=1,
    intervals=(1, 16, 64),
    turns=1,
    turn_shares=(0.20,),
    prefill=1,
    both=1,
    tasks=("two keys",),
    sensitivity=1,
    goal=1,
)


def units_of(sizes: Sizes) -> list[Unit]:
    """Every unit, experiment by experiment in the order of the page."""
    tokens = sizes.tokens
    return [
        *concentration.units(dict(sizes.lengths)),
        *overlap.units(tokens, sizes.overlap),
        *position.units(tokens, sizes.position, sizes.shares, sizes.plain),
        *moving.units(tokens, sizes.moving, sizes.long, sizes.intervals),
        *turns.units(tokens, sizes.turns, sizes.turn_shares),
        *coverage.units(tokens, sizes.coverage, POSITIONS),
        *prefill.units(tokens, sizes.prefill),
        *attention_map.units(tokens),
        *both.units(tokens, sizes.both, sizes.tasks),
        *sensitivity.units(tokens, sizes.sensitivity),
        *goal.units(tokens, sizes.goal),
    ]
