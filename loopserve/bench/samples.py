"""What a benchmark task gives: dialogues whose turns have a question, gold answers and a metric; nothing of models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

Position = Literal["begin", "middle", "end"]


@dataclass(frozen=True)
class AskedTurn:
    """One turn. Gold history holds ``answers[0]``; a turn without answers is acknowledged and not scored.

    text: all that the user says. question: the part of it that asks, for tables and heat maps. metric: a name in
    ``loopserve.bench.metrics.METRICS``. labels: what results are grouped by, besides turn and position (keys asked,
    distances to the turns that told them), and what the metric needs (``classes``).
    """

    text: str
    question: str
    answers: tuple[str, ...]
    position: Position | None
    metric: str
    max_new_tokens: int
    labels: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Sample:
    """One dialogue. The id is unique within its task and stays the same from run to run."""

    id: str
    task: str
    turns: tuple[AskedTurn, ...]


@dataclass(frozen=True)
class BrokenSample:
    """A row that cannot be asked, and why in one line; it is reported and counted, and the run goes on."""

    id: str
    task: str
    why: str


class Task(Protocol):
    """A source of samples. ``version`` changes whenever the same seed gives other samples."""

    name: str
    version: str

    def samples(self, limit: int | None, seed: int) -> Iterator[Sample | BrokenSample]:
        """At most ``limit`` dialogues, the same ones for the same seed, in the same order."""
        ...
