"""Aggregate records: means, standard errors, intervals and p-values, and one row of figures per group of turns.

Groups are by stack, task, position, turn, or any label of the tasks. Turns of one dialogue are not independent, so the
bootstrap draws dialogues. A mean over several tasks is the mean of the tasks' means, so that a large task does not
dominate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import product
from statistics import median
from typing import Any

import torch
from torch import Tensor

from loopserve.bench.quality.records import TIMES, Record, turns

_ROUNDS = 2000
_ALL_SIGNS = 12
Dialogues = Mapping[str, Mapping[str, tuple[float, int]]]  # by task and dialogue: the sum of the values, and how many
_PREFILL = (
    "prefill_cell_density",
    "prefill_tile_density",
    "coverage_estimated",
    "coverage_held_out",
    "coverage_realised",
)
_DECODE = (
    "attended_pairs",
    "attended_fraction",
    "kv_bytes_per_token",
    "kv_bytes_per_token_with_observation",
    "dense_kv_bytes_per_token",
    "compressed_share",
)
_TURN = ("reselected_steps", "fallbacks", "store_bytes", "active_bytes")


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


def summarise(records: Iterable[Record], *by: str) -> list[Record]:
    """Return one row per combination of ``by``, in order of appearance: its values, ``dialogues``, ``turns`` and all figures.

    Scores and agreement have a standard error under ``_se``. Densities are weighted by the pairs that dense attention
    would compute, decode figures by steps. Times are medians. A figure that no turn has is None.
    """
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for record in turns(records):
        groups.setdefault(tuple(group_of(record, name) for name in by), []).append(record)
    return [dict(zip(by, group, strict=True)) | _figures(own) for group, own in groups.items()]


def group_of(record: Record, name: str) -> Any:
    """Return the value of a record's field, or of one of the task's labels."""
    value = record[name] if name in record else record["labels"].get(name)
    return ", ".join(map(str, value)) if isinstance(value, list) else value


def agreed(name: str) -> Callable[[Record], float | None]:
    """Return one figure of the agreement with dense."""

    def value(record: Record) -> float | None:
        found = (record["agreement"] or {}).get(name)
        return None if found is None else float(found)

    return value


def _figures(records: Sequence[Record]) -> Record:
    found: Record = {
        "dialogues": len({(record["task"], record["sample"]) for record in records}),
        "turns": len(records),
    }
    values: dict[str, Callable[[Record], float | None]] = {"score": lambda record: float(record["score"])}
    values |= {
        name: agreed(key)
        for name, key in (("same_first_token", "first_token"), ("same_answer", "answer"), ("kl", "kl"))
    }
    for name, value in values.items():
        dialogues = gather(records, value)
        found |= {name: mean(dialogues), f"{name}_se": standard_error(dialogues)}
    found |= {name: _weighted(records, name, _causal_pairs) for name in _PREFILL}
    found |= {name: _weighted(records, name, _steps) for name in _DECODE}
    found |= {name: _weighted(records, name, lambda _: 1) for name in _TURN}
    dense = found["dense_kv_bytes_per_token"]
    for name in ("kv_bytes_per_token", "kv_bytes_per_token_with_observation"):
        found[name.replace("bytes_per_token", "share")] = found[name] / dense if dense else None
    found |= {name: _median(record[name] for record in records) for name in TIMES}
    return found


def _weighted(records: Iterable[Record], name: str, weigh: Callable[[Record], int]) -> float | None:
    pairs = [(record[name], weigh(record)) for record in records if record[name] is not None]
    weight = sum(each for _, each in pairs)
    return sum(value * each for value, each in pairs) / weight if weight else None


def _causal_pairs(record: Record) -> int:
    new, old = int(record["prompt_tokens"]), int(record["reused_tokens"])
    if old:  # the last token of the previous answer is computed with the turn
        new, old = new + 1, old - 1
    return new * old + new * (new + 1) // 2


def _steps(record: Record) -> int:
    return max(0, int(record["output_tokens"]) - 1)


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None
