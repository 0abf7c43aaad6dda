"""From stored talks to shares with standard errors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from statistics import mean, median
from typing import Any

from research.evidence.units import Row


@dataclass(frozen=True)
class Share:
    """``right`` of ``asked``. The standard error is that of one right and one wrong more, so that it is not 0 at either end."""

    right: float
    asked: int

    @property
    def value(self) -> float:
        return self.right / self.asked if self.asked else math.nan

    @property
    def error(self) -> float:
        share = (self.right + 1) / (self.asked + 2)
        return math.sqrt(share * (1 - share) / (self.asked + 2))

    def __str__(self) -> str:
        return f"{100 * self.value:.0f}" if self.asked else "-"

    @property
    def with_error(self) -> str:
        return f"{100 * self.value:.0f} ± {100 * self.error:.0f}" if self.asked else "-"


@dataclass
class Tally:
    """Talks of one stack, joined over any set of units."""

    answers: list[dict[str, Any]] = field(default_factory=list)
    sums: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, rows: Iterable[Row]) -> Tally:
        tally = cls()
        for row in rows:
            tally.add(row)
        return tally

    def add(self, row: Row) -> None:
        columns = row["found"]["answers"]
        position = row["unit"]["task"].get("position", "mixed")
        turns = row["unit"]["task"].get("turns", 3)
        for number, values in enumerate(zip(*columns.values(), strict=True)):
            answer = dict(zip(columns, values, strict=True))
            self.answers.append(answer | {"position": position, "dialogue": (position, number // turns)})
        for name, amount in row["found"]["sums"].items():
            # What is held at a time is a largest value, everything else adds up.
            joined = max if name in ("store_bytes", "active_bytes") else float.__add__
            self.sums[name] = joined(float(self.sums.get(name, 0.0)), float(amount))

    def right(self, where: Callable[[dict[str, Any]], bool] = lambda _: True) -> Share:
        """Whole answers right among those that ``where`` picks."""
        picked = [answer["right"] for answer in self.answers if where(answer)]
        return Share(sum(picked), len(picked))

    def at(self, position: str) -> Share:
        return self.right(lambda answer: answer["position"] == position)

    def parts(self, where: Callable[[dict[str, Any], int], bool] = lambda *_: True) -> Share:
        """Parts of answers right; ``where`` gets the answer and the part's index."""
        picked = [
            right for answer in self.answers for index, right in enumerate(answer["parts"]) if where(answer, index)
        ]
        return Share(sum(picked), len(picked))

    def _ratio(self, over: Sequence[str], under: str) -> float | None:
        whole = self.sums.get(under, 0.0)
        return sum(self.sums.get(name, 0.0) for name in over) / whole if whole else None

    @property
    def attended(self) -> float | None:
        return self._ratio(["attended"], "attended_of")

    @property
    def cells(self) -> float | None:
        return self._ratio(["cells"], "cells_of")

    @property
    def tiles(self) -> float | None:
        return self._ratio(["tiles"], "tiles_of")

    @property
    def realised(self) -> float | None:
        return self._ratio(["realised"], "realised_of")

    @property
    def bytes_of_steps(self) -> float | None:
        """Share of dense's KV bytes that decode steps read, scoring and summaries included."""
        return self._ratio(["bytes"], "dense_bytes")

    @property
    def bytes_of_all(self) -> float | None:
        """The same with what compressors read before the first output."""
        return self._ratio(["bytes", "observation_bytes"], "dense_bytes")

    @property
    def compressed(self) -> float | None:
        return self._ratio(["compressed_steps"], "steps")

    @property
    def tpot_ms(self) -> float | None:
        return self._ratio(["decode_ms"], "steps")

    def ttft_ms(self, turn: int | None = None) -> float | None:
        """The median."""
        times = [answer["ttft_ms"] for answer in self.answers if turn in (None, answer["turn"])]
        return median(times) if times else None

    def turns(self) -> list[int]:
        return sorted({answer["turn"] for answer in self.answers})

    def distances(self) -> list[int]:
        return sorted({distance for answer in self.answers for distance in answer["distances"]})


def paired(
    first: Tally, second: Tally, where: Callable[[dict[str, Any]], bool] = lambda _: True
) -> tuple[float, float]:
    """Mean difference of right answers over the same dialogues, and its standard error between dialogues."""
    by_dialogue: dict[Any, list[float]] = {}
    for one, other in zip(first.answers, second.answers, strict=True):
        if where(one):
            by_dialogue.setdefault(one["dialogue"], []).append(one["right"] - other["right"])
    means = [mean(values) for values in by_dialogue.values()]
    if not means:
        return math.nan, math.nan
    middle = mean(means)
    spread = sum((value - middle) ** 2 for value in means) / max(len(means) - 1, 1)
    return middle, math.sqrt(spread / len(means))


def with_error(shares: Sequence[float]) -> str:
    """Mean of shares in per cent, with its standard error where there are several."""
    middle = mean(shares)
    if len(shares) < 2:
        return f"{100 * middle:.1f} %"
    spread = sum((share - middle) ** 2 for share in shares) / (len(shares) - 1)
    return f"{100 * middle:.1f} ± {100 * math.sqrt(spread / len(shares)):.1f} %"
