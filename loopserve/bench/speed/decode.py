"""Measure ``loopserve bench decode``: milliseconds per output token after a long history, re-scoring included."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from statistics import fmean, median

from loopserve.api import load_stack
from loopserve.bench.rows import Row, provenance, ratio, times
from loopserve.bench.speed.sides import EngineSide, PlainSide, SharedModel
from loopserve.bench.speed.suite import Decode, Dtype, Suite, cases

Progress = Callable[[str], None]
_WATCHED_OUTPUTS = 17  # one interval of the presets suffices for shares
_GROWING_OUTPUTS = 4  # it copies the whole cache at every step, so a few steps suffice


def run_decode(
    suite: Suite, *, device: str = "cpu", runs: int | None = None, progress: Progress = lambda _: None
) -> Iterator[Row]:
    """Return a row per stack, cache, dtype, number of KV heads and history length, with the growth over the lengths."""
    for part in suite.decode:
        for heads in cases(part, "kv_heads"):
            for dtype in part.dtypes:
                rows: list[Row] = []
                for each in cases(heads, "tokens"):
                    progress(f"decoding after {each.tokens} tokens: {each.kv_heads} KV heads, {dtype}")
                    rows += _measure(each, dtype, device, runs or part.runs or suite.runs, suite.name)
                _add_growth(rows)
                yield from rows


def _measure(part: Decode, dtype: Dtype, device: str, runs: int, suite: str) -> list[Row]:
    assert isinstance(part.tokens, int)
    shared = SharedModel(part, dtype, part.tokens, part.new_tokens, device)
    stacks = {name: load_stack(name) for name in part.stacks}
    engines = {name: EngineSide(shared, stack) for name, stack in stacks.items()}
    plain = {f"transformers, {kind} cache": PlainSide(shared, kind) for kind in part.caches}
    outputs = {
        name: part.dense_output_tokens if stack.is_dense else part.output_tokens for name, stack in stacks.items()
    }
    outputs |= {
        name: _GROWING_OUTPUTS if side.kind == "growing" else part.dense_output_tokens for name, side in plain.items()
    }
    right = {name: side for name, side in engines.items() if not side.audit.problems}
    steps: dict[str, list[list[float]]] = {name: [] for name in [*right, *plain]}
    sides: dict[str, EngineSide | PlainSide] = {**right, **plain}
    for each in plain.values():
        each.answer(2)  # warm, as the engines are from their first turn
    for _ in range(runs):
        for name, side in sides.items():
            steps[name].append(side.answer(outputs[name])[1])
    seconds = {name: [fmean(run) for run in found] for name, found in steps.items()}
    rows = []
    for name in [*engines, *plain]:
        row: Row = {
            "op": "decode_step",
            "shape": shared.described() | {"m": 1, "n": part.tokens},
            "dtype": dtype,
            "data": "random weights, random history put into the cache",
            "stack": name,
            "pattern": None,
            "suite": suite,
            "output_tokens": outputs[name],
            **provenance(device),
        }
        row |= _engine_fields(engines[name], outputs[name]) if name in engines else {"impl": "torch", "parity": "ok"}
        if name in seconds:
            row |= times(seconds[name]) | _ratios(seconds, name)
            row["typical_step_ms"] = median(each for run in steps[name] for each in run) * 1e3
            row["worst_step_ms"] = median(max(run) for run in steps[name]) * 1e3
        rows.append(row)
    return rows


def _ratios(seconds: dict[str, list[float]], name: str) -> Row:
    found: Row = {}
    for field, other in (
        ("ratio_sdpa", "transformers, preallocated cache"),
        ("ratio_growing_cache", "transformers, growing cache"),
        ("ratio_own_dense", "dense"),
    ):
        if other in seconds:
            found |= ratio(field, seconds[other], seconds[name])
    return found | {"sdpa": "sdpa in transformers, the row's own dtype"}


def _engine_fields(side: EngineSide, outputs: int) -> Row:
    fields = side.described()
    return fields if side.audit.problems else fields | {"phase_shares": side.phases(min(outputs, _WATCHED_OUTPUTS))}


def _add_growth(rows: list[Row]) -> None:
    """Add ``growth`` to each row with a time: its time over that of the shortest history of the same stack."""
    shortest: dict[str, Row] = {}
    for row in sorted((row for row in rows if "median_ms" in row), key=lambda row: int(row["shape"]["n"])):
        first = shortest.setdefault(row["stack"], row)
        row["growth"] = row["median_ms"] / first["median_ms"]
        row["growth_from"] = first["shape"]["n"]
