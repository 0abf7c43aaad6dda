"""Units that hold dialogues, and the rows of such units by label, position and whatever else they differ in."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

from loopserve.api import load_stack
from research.evidence.recipes import Recipe
from research.evidence.tally import Tally
from research.evidence.units import Row, Unit

POSITIONS = ("begin", "middle", "end")


def talk(
    experiment: str,
    label: str,
    stack: Recipe,
    task: dict[str, Any],
    dialogues: int,
    *,
    seed: int,
    model: str = "demo",
    **more: Any,
) -> Unit:
    """A unit of ``conversations.hold``. more: flags it knows, and what the page groups by. ConfigError for a wrong stack."""
    spec = {
        "kind": "talk",
        "label": label,
        "model": model,
        "stack": stack,
        "digest": _digest(json.dumps(stack)),
        "task": task,
        "dialogues": dialogues,
        "seed": seed,
        **more,
    }
    return Unit(experiment, spec)


@cache
def _digest(stack: str) -> str:
    return load_stack({"version": 1, "name": "evidence", **json.loads(stack)}).digest


def at_positions(
    experiment: str,
    label: str,
    stack: Recipe,
    task: dict[str, Any],
    dialogues: int,
    positions: Sequence[str] = POSITIONS,
    **more: Any,
) -> list[Unit]:
    """The same at each position of the question, so that a position is a unit."""
    return [talk(experiment, label, stack, {**task, "position": position}, dialogues, **more) for position in positions]


def tallies(rows: Iterable[Row], *by: str) -> dict[Any, Tally]:
    """Rows joined by fields of their units, ``label`` by default; keys are tuples where there are several fields."""
    found: dict[Any, Tally] = {}
    for row in rows:
        unit = row["unit"]
        key = tuple(unit.get(name) for name in by or ("label",))
        found.setdefault(key if len(key) > 1 else key[0], Tally()).add(row)
    return found
