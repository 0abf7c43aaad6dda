"""Measure whole models: ``loopserve bench prefill`` and ``loopserve bench decode``.

Prefill is time to first token of a later turn, short turns, and whole conversations. Decode is milliseconds per output
token after a long history, re-scoring included. Random weights have no attention structure, so a sparse stack does its
full scoring and selection on its inputs and then computes planted lines of a given density. The rows record this.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from statistics import fmean, median

import torch

from loopserve.api import load_stack
from loopserve.bench.heads import PlantedSparsifier
from loopserve.bench.rows import Row, provenance, ratio, times
from loopserve.bench.speed.sides import EngineSide, PlainSide, SharedModel
from loopserve.bench.speed.suite import Conversation, Decode, Dtype, ModelShape, Prefill, Short, Suite, cases
from loopserve.core.engine.sampling import SamplingConfig
from loopserve.core.stack.stack import PolicyStack
from loopserve.models.bridge import IMPLEMENTATION
from loopserve.models.layers import set_implementation

Progress = Callable[[str], None]
_PLAIN = "transformers, preallocated cache"
_WATCHED_OUTPUTS = 17  # one interval of the presets suffices for shares
_GROWING_OUTPUTS = 4  # it copies the whole cache at every step, so a few steps suffice


def run_prefill(
    suite: Suite, *, device: str = "cpu", runs: int | None = None, progress: Progress = lambda _: None
) -> Iterator[Row]:
    """Yield the rows of a suite's ``prefill`` and ``short`` parts."""
    for part in suite.prefill:
        for each in cases(part, "kv_heads", "tokens"):
            for dtype in part.dtypes:
                progress(f"later turn: {each.new_tokens} new over {each.tokens} tokens, {dtype}")
                yield from _later_turn(each, dtype, device, runs or part.runs or suite.runs, suite.name)
    for short in suite.short:
        for one in cases(short, "kv_heads", "tokens"):
            for dtype in short.dtypes:
                progress(f"short turn: {one.tokens} tokens, {dtype}")
                yield from _short_turn(one, dtype, device, runs or short.runs or suite.runs, suite.name)


def planted_stack(name: str, density: float, chooses_on: str) -> tuple[PolicyStack, PlantedSparsifier | None]:
    """Return a stack whose sparsifier selects as usual and computes planted lines; a dense stack is returned unchanged."""
    stack = load_stack(name)
    if stack.prefill.capabilities.passive:
        return stack, None
    planted = PlantedSparsifier(stack.prefill, density, structured=chooses_on == "structured")
    return replace(stack, prefill=planted), planted


def _later_turn(part: Prefill, dtype: Dtype, device: str, runs: int, suite: str) -> Iterator[Row]:
    assert isinstance(part.tokens, int)
    shared = SharedModel(part, dtype, part.tokens, part.new_tokens, device)
    made = {name: planted_stack(name, part.density, part.chooses_on) for name in ("dense", *part.stacks)}
    engines = {name: EngineSide(shared, stack) for name, (stack, _) in made.items()}
    right = {name: side for name, side in engines.items() if not side.audit.problems}
    sides: dict[str, EngineSide | PlainSide] = {**right, _PLAIN: PlainSide(shared, "preallocated")}
    sides[_PLAIN].answer(1)
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    choosing: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(runs):
        for name, side in sides.items():
            planted = made[name][1] if name in made else None
            if planted is None:
                seconds[name].append(side.answer(1)[0])
                continue
            planted.choosing_s = planted.drawing_s = 0.0
            seconds[name].append(side.answer(1)[0] - planted.drawing_s)
            choosing[name].append(planted.choosing_s)
    for name in [*engines, _PLAIN]:
        row = _head("ttft", shared, part, dtype, name, suite, device)
        row["shape"] |= {"m": part.new_tokens, "n": part.tokens + part.new_tokens}
        row["data"] += ", random history put into the cache"
        if name in part.stacks:
            row |= _planted(row, part)
        row |= engines[name].described() if name in engines else {"impl": "torch", "parity": "ok"}
        if name in seconds:
            row |= times(seconds[name]) | ratio("ratio_sdpa", seconds[_PLAIN], seconds[name])
            if "dense" in seconds:
                row |= ratio("ratio_own_dense", seconds["dense"], seconds[name])
            if choosing[name]:
                row["choosing_ms"] = median(choosing[name]) * 1e3
        yield row


def _short_turn(part: Short, dtype: Dtype, device: str, runs: int, suite: str) -> Iterator[Row]:
    """Measure a whole first turn, prefill and answer; ``ratio_own_dense`` must not fall below 0.97."""
    assert isinstance(part.tokens, int)
    shared = SharedModel(part, dtype, 0, part.tokens, device)
    sides = {name: EngineSide(shared, load_stack(name)) for name in ("dense", *part.stacks)}
    right = {name: side for name, side in sides.items() if not side.audit.problems}
    seconds: dict[str, list[float]] = {name: [] for name in right}
    for run in range(runs):
        # Differences of a percent matter here, so the order of the sides alternates.
        for name in right if run % 2 else reversed(right):
            seconds[name].append(right[name].whole(part.output_tokens))
    for name in sides:
        row = _head("short_turn", shared, part, dtype, name, suite, device)
        row["shape"] |= {"m": part.tokens, "n": part.tokens}
        row |= {"output_tokens": part.output_tokens} | sides[name].described()
        if name in seconds:
            row |= times(seconds[name])
            row |= ratio("ratio_own_dense", seconds["dense"], seconds[name]) if "dense" in seconds else {}
        yield row


def _planted(row: Row, part: Prefill | Conversation) -> Row:
    """Return the fields of a sparse stack on random weights."""
    on = "its own flat attention" if part.chooses_on == "own" else "structured heads of the same shape"
    note = f"; scoring and selection in full on {on}, then {part.density:.0%} of the cells planted"
    return {"data": row["data"] + note, "pattern": {"cell_density": part.density}}


def run_conversation(suite: Suite, *, device: str = "cpu", progress: Progress = lambda _: None) -> Iterator[Row]:
    """Yield TTFT and TPOT of every turn of a growing conversation, each stack in its own session, in turn."""
    for part in suite.conversation:
        for each in cases(part, "kv_heads"):
            for dtype in part.dtypes:
                progress(f"conversation of {each.tokens} tokens in {each.turns} turns, {dtype}")
                yield from _conversation(each, dtype, device, suite.name)


def _conversation(part: Conversation, dtype: Dtype, device: str, suite: str) -> Iterator[Row]:
    new_tokens = part.tokens // part.turns - part.output_tokens
    shared = SharedModel(part, dtype, 0, min(new_tokens, 512), device, positions=part.tokens)
    made = {name: planted_stack(name, part.density, part.chooses_on) for name in part.stacks}
    sides = {name: EngineSide(shared, stack) for name, (stack, _) in made.items()}
    draw = torch.Generator().manual_seed(1)
    set_implementation(shared.model, IMPLEMENTATION)
    for turn in range(part.turns):
        ids = torch.randint(0, part.vocabulary, (new_tokens,), generator=draw, device="cpu").tolist()
        first: dict[str, list[float]] = {}
        later: dict[str, list[float]] = {}
        for name, side in sides.items():
            if side.audit.problems:
                continue
            planted = made[name][1]
            if planted is not None:
                planted.drawing_s = 0.0
            started = time.perf_counter()
            sampling = SamplingConfig(max_new_tokens=part.output_tokens)
            arrivals = [time.perf_counter() for _ in side.engine.generate(side.session, ids, sampling, frozenset())]
            first[name] = [arrivals[0] - started - (planted.drawing_s if planted is not None else 0.0)]
            later[name] = [fmean(b - a for a, b in pairwise(arrivals))]
        for op, seconds in (("ttft", first), ("decode_step", later)):
            for name in sides:
                row = _head(op, shared, part, dtype, name, suite, device)
                row["shape"] |= {"m": new_tokens, "n": sides[name].session.cache.seen, "turn": turn + 1}
                if not load_stack(name).prefill.capabilities.passive:
                    row |= _planted(row, part)
                row |= sides[name].described()
                if name in seconds:
                    row |= times(seconds[name])
                    row |= ratio("ratio_own_dense", seconds["dense"], seconds[name]) if "dense" in seconds else {}
                yield row


def _head(op: str, shared: SharedModel, part: ModelShape, dtype: Dtype, stack: str, suite: str, device: str) -> Row:
    return {
        "op": op,
        "shape": shared.described(),
        "dtype": dtype,
        "data": "random weights",
        "stack": stack,
        "pattern": None,
        "suite": suite,
        **provenance(device),
    }


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
