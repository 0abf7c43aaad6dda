"""Define tasks: dialogues whose turns have a question, gold answers and a metric, and the options that every task shares.

An option that takes one value or several stands for one case per value.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeVar

from pydantic import BaseModel, ConfigDict, Field

Position = Literal["begin", "middle", "end"]
POSITIONS: tuple[Position, ...] = ("begin", "middle", "end")
OneOrMore = int | tuple[int, ...]
Places = Position | tuple[Position, ...]
Value = TypeVar("Value", int, Position)


@dataclass(frozen=True)
class AskedTurn:
    """Hold one turn. Gold history holds ``answers[0]``; a turn without answers is acknowledged and not scored.

    text: the user's whole message. question: the part of it that asks, for tables and heat maps. metric: a name in
    ``loopserve.bench.metrics.METRICS``. labels: values that results are grouped by, besides turn and position (keys
    asked, distances to the turns that stated them), and parameters of the metric (``classes``).
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
    """Hold one dialogue. The id is unique within its task and equal in every run."""

    id: str
    task: str
    turns: tuple[AskedTurn, ...]


@dataclass(frozen=True)
class BrokenSample:
    """Hold a row that cannot be asked, and the reason in one line. It is reported and counted, and the run continues."""

    id: str
    task: str
    why: str


class Task(Protocol):
    """Define a source of samples. ``version`` changes whenever the same seed gives other samples."""

    name: str
    version: str

    def samples(self, limit: int | None, seed: int) -> Iterator[Sample | BrokenSample]:
        """Yield at most ``limit`` dialogues: equal ones for equal seeds, in the same order."""
        ...


class TaskOptions(BaseModel):
    """Hold the options of a task, as a suite file gives them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str | None = Field(
        None, min_length=1, description="Name in results; the task's own by default. For a task that a suite has twice."
    )


def several(value: Value | tuple[Value, ...]) -> tuple[Value, ...]:
    """Return one value or several as a sequence."""
    return value if isinstance(value, tuple) else (value,)
