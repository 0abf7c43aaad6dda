"""Estimate means over dialogues and their uncertainty by bootstrap over dialogues.

Turns of one dialogue are not independent, so dialogues are the unit. A mean over several tasks is the mean of the
tasks' means, so that a large task does not dominate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import product

import torch
from torch import Tensor

from loopserve.bench.quality.records import Record

_ROUNDS = 2000
_ALL_SIGNS = 12
Dialogues = Mapping[str, Mapping[str, tuple[float, int]]]  # by task and dialogue: the sum of the values, and how many


def gather(records: Iterable[Record], value: Callable[[Record], float | None]) -> Dialogues:
    """Return the values of records by task and dialogue, without None."""
    found: dict[str, dict[str, tuple[float, int]]] = {}
    for record in records:
        each = value(record)
        if each is not None:
            total, count = found.setdefault(record["task"], {}).get(record["sample"], (0.0, 0))
            found[record["task"]][record["sample"]] = total + each, count + 1
    return found


def mean(dialogues: Dialogues) -> float | None:
    """Return the mean over tasks, None if there is no value."""
    means = [
        sum(total for total, _ in each.values()) / sum(count for _, count in each.values())
        for each in dialogues.values()
    ]
    return sum(means) / len(means) if means else None


def redrawn(dialogues: Dialogues) -> Tensor | None:
    """Return bootstrap means, float64 ``[rounds]``: dialogues drawn with replacement within each task, with a fixed seed.

    None if a task has fewer than two dialogues, since no variance can be estimated.
    """
    if not dialogues or any(len(each) < 2 for each in dialogues.values()):
        return None
    draw = torch.Generator().manual_seed(0)
    means = []
    for each in dialogues.values():
        values = torch.tensor(list(each.values()), dtype=torch.float64, device="cpu")
        drawn = values[torch.randint(len(values), (_ROUNDS, len(values)), generator=draw, device="cpu")].sum(1)
        means.append(drawn[:, 0] / drawn[:, 1])
    return torch.stack(means).mean(0)


def standard_error(dialogues: Dialogues) -> float | None:
    drawn = redrawn(dialogues)
    return None if drawn is None else float(drawn.std())


def chance(dialogues: Dialogues) -> float:
    """Return the p-value of a sign-flip test: the probability of a mean as far from 0 under random signs of the dialogues.

    Up to twelve dialogues all sign combinations are counted, beyond that 4,095 drawn ones and the observed one.
    """
    values = [
        [total / sum(count for _, count in own.values()) for total, _ in own.values()] for own in dialogues.values()
    ]
    terms = torch.tensor([value / len(values) for own in values for value in own], dtype=torch.float64, device="cpu")
    if len(terms) <= _ALL_SIGNS:
        signs = torch.tensor(list(product((1.0, -1.0), repeat=len(terms))), dtype=torch.float64, device="cpu")
    else:
        draw = torch.Generator().manual_seed(0)
        signs = torch.randint(2, (1 << _ALL_SIGNS, len(terms)), generator=draw, device="cpu").double() * 2 - 1
        signs[0] = 1.0
    means = (signs @ terms).abs()
    return float((means >= means[0] - 1e-12).double().mean())


def interval(dialogues: Dialogues, level: float = 0.95) -> tuple[float, float] | None:
    """Return the central ``level`` interval of the bootstrap means."""
    drawn = redrawn(dialogues)
    if drawn is None:
        return None
    tail = (1 - level) / 2
    low, high = drawn.quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64, device="cpu")).tolist()
    return low, high
