"""Compare two sides on the same questions by turn: paired score differences, confidence intervals and p-values."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from loopserve.bench.quality.records import Record, turns
from loopserve.bench.quality.run import Run
from loopserve.bench.quality.summary import chance, gather, group_of, interval, mean
from loopserve.bench.quality.tables import Table, plus_minus
from loopserve.core.errors import ConfigError

_LEVEL = 0.05
_ENOUGH = 6  # dialogues: with fewer, differences of equal sign in all of them have a higher p-value than this level
_GROUPS = ((), ("task",), ("position",), ("task", "position"), ("turn",))


@dataclass(frozen=True)
class Difference:
    """Hold the difference (b - a) of one group of turns. low, high: 95 % interval by dialogue, None for one dialogue.

    chance: p-value of a sign-flip test by dialogue.
    """

    stack: str  # or "a against b"
    group: str
    dialogues: int
    turns: int
    a: float
    b: float
    difference: float
    low: float | None
    high: float | None
    chance: float
    verdict: str

    def as_dict(self) -> dict[str, Any]:
        return dict(self.__dict__)


def compare_stacks(run: Run, a: str, b: str) -> list[Difference]:
    """Compare two stacks of one run."""
    return _differences(f"{b} - {a}", run.of_stack(a), run.of_stack(b))


def compare_runs(a: Run, b: Run) -> list[Difference]:
    """Compare each stack that took part in both runs. Raises ConfigError if they share no stack or no question."""
    shared = [name for name in a.stacks if name in b.stacks]
    if not shared:
        raise ConfigError(f"the runs have no stack in common: {', '.join(a.stacks)} and {', '.join(b.stacks)}")
    return [each for name in shared for each in _differences(name, a.of_stack(name), b.of_stack(name))]


def table(differences: Sequence[Difference]) -> Table:
    rows = tuple(
        (
            each.stack,
            each.group,
            plus_minus(each.a, None),
            plus_minus(each.b, None),
            f"{each.difference * 100:+.1f}",
            "-" if each.low is None or each.high is None else f"{each.low * 100:+.1f} to {each.high * 100:+.1f}",
            f"{each.chance:.3f}",
            f"{each.dialogues} / {each.turns}",
            each.verdict,
        )
        for each in differences
    )
    columns = ("stack", "turns", "A", "B", "B - A", "95 % interval", "chance", "dialogues / turns", "verdict")
    note = "Scores in %, paired turn by turn; intervals by bootstrap over dialogues, chance by flipping their signs."
    return Table("Differences", columns, rows, note)


def _differences(name: str, a: Iterable[Record], b: Iterable[Record]) -> list[Difference]:
    known = {_question(record): record for record in turns(a)}
    pairs = [(known[_question(record)], record) for record in turns(b) if _question(record) in known]
    if not pairs:
        raise ConfigError(f"{name}: no question was asked on both sides (other suites, seeds or limits?)")
    if any(ours["gold"] != theirs["gold"] for ours, theirs in pairs):
        raise ConfigError(f"{name}: the same samples have other gold answers on the two sides: their tasks differ")
    paired = [
        {**ours, "score": theirs["score"] - ours["score"], "a": ours["score"], "b": theirs["score"]}
        for ours, theirs in pairs
    ]
    found = []
    for grouping in _GROUPS:
        groups: dict[tuple[Any, ...], list[Record]] = {}
        for record in paired:
            groups.setdefault(tuple(group_of(record, each) for each in grouping), []).append(record)
        if len(groups) > 1 or not grouping:
            found += [_difference(name, grouping, group, own) for group, own in groups.items()]
    return found


def _question(record: Record) -> tuple[str, str, int]:
    return record["task"], record["sample"], record["turn"]


def _difference(name: str, grouping: tuple[str, ...], group: tuple[Any, ...], records: Sequence[Record]) -> Difference:
    a, b = mean(gather(records, lambda record: record["a"])), mean(gather(records, lambda record: record["b"]))
    dialogues = gather(records, lambda record: record["score"])
    bounds = interval(dialogues)
    by_chance = chance(dialogues)
    count = sum(len(each) for each in dialogues.values())
    spoken = " / ".join(
        f"turn {value + 1}" if each == "turn" else str(value) for each, value in zip(grouping, group, strict=True)
    )
    return Difference(
        name,
        spoken or "all",
        count,
        len(records),
        a or 0.0,
        b or 0.0,
        mean(dialogues) or 0.0,
        bounds[0] if bounds else None,
        bounds[1] if bounds else None,
        by_chance,
        _verdict(
            mean(dialogues) or 0.0, bounds, by_chance, count, same=all(record["score"] == 0 for record in records)
        ),
    )


def _verdict(
    difference: float, bounds: tuple[float, float] | None, by_chance: float, dialogues: int, *, same: bool
) -> str:
    if same:
        return "no difference"
    if dialogues < _ENOUGH:
        return f"too few dialogues to tell (at least {_ENOUGH})"
    if by_chance > _LEVEL or (bounds is not None and bounds[0] <= 0 <= bounds[1]):
        return "noise"
    return "B is better" if difference > 0 else "A is better"
