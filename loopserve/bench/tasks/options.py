"""Define the options that every task shares. A field that takes one value or several stands for one case per value."""

from __future__ import annotations

from typing import TypeVar

from pydantic import BaseModel, ConfigDict, Field

from loopserve.bench.samples import Position

POSITIONS: tuple[Position, ...] = ("begin", "middle", "end")
OneOrMore = int | tuple[int, ...]
Places = Position | tuple[Position, ...]
Value = TypeVar("Value", int, Position)


class TaskOptions(BaseModel):
    """Hold the options of a task, as a suite file gives them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str | None = Field(
        None, min_length=1, description="Name in results; the task's own by default. For a task that a suite has twice."
    )


def several(value: Value | tuple[Value, ...]) -> tuple[Value, ...]:
    """Return one value or several as a sequence."""
    return value if isinstance(value, tuple) else (value,)
