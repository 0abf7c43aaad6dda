"""Aggregate records into one row of figures per group of turns (by stack, task, position, turn, or any label of the tasks)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from statistics import median
from typing import Any

from loopserve.bench.quality.estimates import gather, mean, standard_error
from loopserve.bench.quality.records import TIMES, Record, turns

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
