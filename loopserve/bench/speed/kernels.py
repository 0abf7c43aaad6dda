"""Measure ``loopserve bench kernels``: operations beside dense attention, in one process. A wrong result gets no time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, get_args

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from loopserve.bench.heads import Heads
from loopserve.bench.rows import Row, provenance, ratio, times
from loopserve.bench.speed.decode_ops import decode_case
from loopserve.bench.speed.parity import Candidate, Case, Target, Verdict
from loopserve.bench.speed.prefill_ops import prefill_case
from loopserve.bench.speed.sides import Clock, Runner, paired_runs, wall_clock, watched
from loopserve.bench.speed.suite import DecodeOp, PrefillOp, Suite, cases
from loopserve.core.errors import ConfigError, did_you_mean
from loopserve.core.policy.patterns import LinePattern
from loopserve.kernels.masked import fused, merge

Progress = Callable[[str], None]
_CPU_DTYPES = (torch.float32, torch.bfloat16)
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
FLEX_TILE = 128  # FlexAttention's tiles of rows and keys


class CpuTarget:
    """Time torch's SDPA in float32 and bfloat16 by the wall clock."""

    device = "cpu"

    def clock(self, run: Callable[[], object]) -> float:
        return wall_clock(run)

    def dense(self, heads: Heads, dtypes: tuple[torch.dtype, ...]) -> dict[str, Callable[[], object]]:
        """Return both precisions for any dtype of the case, since a user can choose the faster."""
        return sdpa(heads)

    def rivals(self, case: Case) -> list[Candidate]:
        return []


def target_for(device: str) -> Target:
    """Return the target of a device. Raises ConfigError for a device that is not present."""
    if device == "cpu":
        return CpuTarget()
    if not device.startswith("cuda"):
        raise ConfigError(f"device {device!r} is unknown to the benchmark (known: cpu, cuda)")
    if not torch.cuda.is_available():
        raise ConfigError(f"device {device!r}: torch sees no GPU here")
    return CudaTarget(device)


def check_ops(names: Iterable[str]) -> tuple[str, ...]:
    """Return the names of operations. Raises ConfigError for an unknown name."""
    known = (*get_args(PrefillOp), *get_args(DecodeOp))
    for name in names:
        if name not in known:
            raise ConfigError(f"unknown operation {name!r}{did_you_mean(name, known)}")
    return tuple(names)


def run_kernels(
    suite: Suite,
    *,
    device: str = "cpu",
    only: tuple[str, ...] = (),
    runs: int | None = None,
    progress: Progress = lambda _: None,
) -> Iterator[Row]:
    """Yield the rows of a suite's kernel parts, case by case. only: operations to measure, all by default."""
    target = target_for(device)
    for case, wanted in _cases(suite, device, progress):
        yield from measure(case, target, runs or wanted, only, suite.name)


def _cases(suite: Suite, device: str, progress: Progress) -> Iterator[tuple[Case, int]]:
    for part in suite.prefill_kernels:
        for each in cases(part, "tokens", "new_tokens", "head_dim", "density"):
            progress(f"{each.data}: {each.new_tokens or each.tokens} of {each.tokens} tokens, D {each.head_dim}")
            yield prefill_case(each, device), part.runs or suite.runs
    for step in suite.decode_kernels:
        for one in cases(step, "tokens", "kv_heads", "head_dim", "batch"):
            progress(f"decoding: {one.tokens} tokens, {one.kv_heads} KV heads, batch {one.batch}")
            yield decode_case(one, device), step.runs or suite.runs


@torch.inference_mode()
def measure(case: Case, target: Target, runs: int, only: tuple[str, ...] = (), suite: str = "") -> list[Row]:
    """Return one row per candidate. All are verified first; the correct ones then run in turn with the dense baselines."""
    wanted = [each for each in [*case.candidates, *target.rivals(case)] if not only or each.op in only]
    judged = {_name(each): _judge(each) for each in [*wanted, *case.own_dense.values()]}
    right = {name: each for name, each in ((_name(each), each) for each in wanted) if judged[name][1].ok}
    own = {dtype: each for dtype, each in case.own_dense.items() if judged[_name(each)][1].ok}
    rows = [_head(each, case, suite, target.device) | judged[_name(each)][0] for each in wanted]
    if not right:
        return rows
    name, best, tried = fastest(target.dense(case.dense, tuple(case.own_dense)), case.dense_scale, target.clock)
    runners = {"sdpa": best}
    if case.dense.queries.shape[1] == 1:
        runners |= {f"eager {dtype}": Runner(eager_step(case.dense, dtype)) for dtype in case.own_dense}
        for runner in runners.values():
            runner.run()  # warm, as the candidates are by now
    runners |= {_name(each): Runner(each.run, each.scale) for each in [*right.values(), *own.values()]}
    found = paired_runs(runners, runs, target.clock)
    for row, each in zip(rows, wanted, strict=True):
        if _name(each) not in right:
            continue
        seconds = found[_name(each)]
        row |= times(seconds) | ratio("ratio_sdpa", found["sdpa"], seconds)
        row |= {"sdpa": name, "sdpa_ms": times(found["sdpa"])["median_ms"], "sdpa_tried_ms": tried}
        if each.dtype in own:
            row |= ratio("ratio_own_dense", found[_name(own[each.dtype])], seconds)
            row["own_dense"] = judged[_name(own[each.dtype])][0]["impl"]
        if f"eager {each.dtype}" in found:
            row |= ratio("ratio_eager", found[f"eager {each.dtype}"], seconds)
        if row["pattern"] and "tile_density" in row["pattern"]:  # tiles per second, as a share of dense attention's
            row["tile_throughput"] = row["pattern"]["tile_density"] * row["ratio_sdpa"]
    _add_choosing(rows)
    return rows


def _add_choosing(rows: list[Row]) -> None:
    """Add ``choosing_share`` to ``sparse_prefill``: the share of line selection in its time, where that was timed as well."""
    timed = {(row["op"], row["dtype"]): row["median_ms"] for row in rows if "median_ms" in row}
    for row in rows:
        choosing = timed.get(("choose_lines", row["dtype"]))
        if row["op"] == "sparse_prefill" and "median_ms" in row and choosing is not None:
            row["choosing_share"] = choosing / row["median_ms"]


def _name(candidate: Candidate) -> str:
    """Return a name unique within a case: our dense decode attention is the same operation as the sparse one's."""
    return f"{candidate.op} {candidate.dtype} {candidate.impl} {id(candidate)}"


def _head(candidate: Candidate, case: Case, suite: str, device: str) -> Row:
    return {
        "op": candidate.op,
        "shape": case.shape,
        "dtype": str(candidate.dtype).removeprefix("torch."),
        "data": case.data,
        **case.fields,
        **candidate.fields,
        "suite": suite,
        **provenance(device),
    }


def _judge(candidate: Candidate) -> tuple[Row, Verdict]:
    """Return the fields of a candidate before it is timed: implementations, pattern, errors, parity."""
    pattern: Row | None = None
    with watched() as seen:
        try:
            found: Any = candidate.run()
            impl = candidate.impl or seen.impl(*candidate.parts)
            parts = {op: "+".join(sorted(seen.served.get(op, ()))) for op in candidate.parts}
            judged, pattern = candidate.check(found), candidate.pattern(found)
        except Exception as error:  # an implementation that raises has no result, whatever the error
            first = (str(error).strip().splitlines() or [""])[0]
            impl, parts = candidate.impl or seen.impl(*candidate.parts), {}
            judged = Verdict(float("inf"), float("inf"), None, False, f"{type(error).__name__}: {first}")
    row: Row = {"impl": impl, "pattern": pattern, "rel_err": judged.rel_err, "parity": "ok" if judged.ok else "failed"}
    if len(parts) > 1:
        row["impl_parts"] = parts
    row |= {"rel_err_pattern": judged.error, "parity_err": judged.worst}
    return row | ({} if judged.ok else {"error": judged.why}), judged


def sdpa(heads: Heads, dtypes: tuple[torch.dtype, ...] = _CPU_DTYPES) -> dict[str, Callable[[], object]]:
    """Return by name every way to compute the causal block of ``heads`` densely with torch's SDPA on a CPU."""
    found: dict[str, Callable[[], object]] = {}
    rows, total = heads.queries.shape[1], heads.keys.shape[1]
    for dtype in dtypes:
        cast = heads.to(dtype)
        queries, keys, values = (each[None] for each in cast.tensors)
        name = str(dtype).removeprefix("torch.")
        grouped = queries.shape[1] != keys.shape[1]
        if rows == 1:
            one = queries.reshape(1, keys.shape[1], -1, queries.shape[3])  # a group's heads as rows
            found[f"sdpa {name}"] = partial(scaled_dot_product_attention, one, keys, values)
        elif rows == total:
            found[f"sdpa {name} causal"] = partial(
                scaled_dot_product_attention, queries, keys, values, is_causal=True, enable_gqa=grouped
            )
        else:
            found[f"sdpa {name} past + causal"] = partial(_split, queries, keys, values, cast.scaling)
    return found


def _split(queries: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Tensor:
    old, new = slice(None, keys.shape[2] - queries.shape[2]), slice(keys.shape[2] - queries.shape[2], None)
    past = fused(queries, keys[:, :, old], values[:, :, old], scaling=scaling)
    own = fused(queries, keys[:, :, new], values[:, :, new], scaling=scaling, causal=True)
    return merge(past, own)[0].to(queries.dtype)


def eager_step(heads: Heads, dtype: torch.dtype) -> Callable[[], object]:
    """Run one decode step by two matrix products and a softmax, which is faster than bfloat16 SDPA on some CPUs."""
    cast = heads.to(dtype)
    rows = cast.queries.reshape(cast.keys.shape[0], -1, cast.queries.shape[2])
    return lambda: torch.softmax(rows @ cast.keys.transpose(1, 2) * cast.scaling, -1) @ cast.values


def fastest(
    candidates: dict[str, Callable[[], object]], scale: float, clock: Clock
) -> tuple[str, Runner, dict[str, float]]:
    """Return the name of the fastest, its runner, and scaled milliseconds of each. Every candidate is tried once, warm."""
    tried = {}
    for name, run in candidates.items():
        seconds = clock(run)
        # Short runs are tried a second time; long ones are warm after their first tile.
        tried[name] = (min(seconds, clock(run)) if seconds < 1.0 else seconds) * scale * 1e3
    best = min(tried, key=tried.__getitem__)
    return best, Runner(candidates[best], scale), tried


class CudaTarget:
    """Time torch's fused attentions on one GPU by CUDA events."""

    def __init__(self, device: str = "cuda") -> None:
        self.device = device

    def clock(self, run: Callable[[], object]) -> float:
        """Return seconds of one call between two events on the current stream."""
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        stop.record()
        torch.cuda.synchronize()
        return float(start.elapsed_time(stop)) / 1e3

    def dense(self, heads: Heads, dtypes: tuple[torch.dtype, ...]) -> dict[str, Callable[[], object]]:
        return fused_dense(heads, dtypes)

    def rivals(self, case: Case) -> list[Candidate]:
        """Return FlexAttention, compiled, on the line patterns of the case."""
        return [flex_rival(each, compiled=True) for each in case.candidates if each.op == "vertical_slash"]


def fused_dense(
    heads: Heads, dtypes: tuple[torch.dtype, ...], backends: dict[str, SDPBackend] | None = None
) -> dict[str, Callable[[], object]]:
    """Return by name each of torch's fused attentions that supports the block."""
    found: dict[str, Callable[[], object]] = {}
    repeated = heads.queries.shape[0] != heads.keys.shape[0]
    for dtype in dtypes:
        kind = str(dtype).removeprefix("torch.")
        for name, backend in (backends or BACKENDS).items():
            # Not every backend supports grouped heads; keys repeated beforehand give the same result.
            for spread in (False, True) if repeated else (False,):
                run = partial(_dense, _spread(heads.to(dtype)) if spread else heads.to(dtype), backend)
                try:
                    run()
                except (RuntimeError, ValueError):  # this backend does not support such shapes or this device
                    continue
                found[f"sdpa {kind} {name}" + (", keys repeated" if spread else "")] = run
                break
    if not found:
        raise ConfigError("none of torch's fused attentions serves this block: there is nothing to compare with")
    return found


def _spread(heads: Heads) -> Heads:
    group = heads.queries.shape[0] // heads.keys.shape[0]
    return replace(heads, keys=heads.keys.repeat_interleave(group, 0), values=heads.values.repeat_interleave(group, 0))


def _dense(heads: Heads, backend: SDPBackend) -> Tensor:
    rows, total = heads.queries.shape[1], heads.keys.shape[1]
    queries, keys, values = (each[None] for each in heads.tensors)
    grouped = queries.shape[1] != keys.shape[1]
    with sdpa_kernel(backend):
        if rows == 1:  # a group's heads as rows: keys are read once
            queries = queries.reshape(1, keys.shape[1], -1, queries.shape[3])
            return scaled_dot_product_attention(queries, keys, values)
        if rows == total:
            return scaled_dot_product_attention(queries, keys, values, is_causal=True, enable_gqa=grouped)
        bias: Any = causal_lower_right(rows, total)
        return scaled_dot_product_attention(queries, keys, values, attn_mask=bias, enable_gqa=grouped)


def flex_rival(ours: Candidate, *, compiled: bool) -> Candidate:
    """Compute the same lines by FlexAttention: a block mask of the tiles they touch, a mask function for the cells inside."""
    assert ours.lines is not None
    heads, lines = ours.lines
    attend: Any = torch.compile(flex_attention, dynamic=False) if compiled else flex_attention
    mask = flex_mask(lines)
    queries, keys, values = (each[None] for each in heads.tensors)
    grouped = queries.shape[1] != keys.shape[1]

    def run() -> Tensor:
        found: Tensor = attend(queries, keys, values, block_mask=mask, scale=heads.scaling, enable_gqa=grouped)[0]
        return found

    return Candidate(ours.op, ours.dtype, run, ours.check, (), ours.pattern, impl="flex_attention")


def flex_mask(lines: LinePattern) -> BlockMask:
    """Return a block mask from the geometry of the lines: torch's constructor would materialise every cell."""
    heads, new, total = lines.size
    history, device = total - new, lines.verticals.device
    key_tiles, query_tiles = -(-total // FLEX_TILE), -(-new // FLEX_TILE)
    padded = torch.nn.functional.pad(lines.verticals, (0, key_tiles * FLEX_TILE - total))
    by_verticals = padded.view(heads, key_tiles, FLEX_TILE).any(-1)
    first_query = torch.arange(query_tiles, device=device)[:, None] * FLEX_TILE + history
    first_key = torch.arange(key_tiles, device=device) * FLEX_TILE
    nearest = (first_query - first_key - FLEX_TILE + 1).clamp(0, total)  # offsets of a pair of tiles: first ...
    farthest = (first_query - first_key + FLEX_TILE).clamp(0, total)  # ... and end
    below = torch.nn.functional.pad(lines.slashes.long().cumsum(1), (1, 0))
    by_slashes = below[:, farthest] > below[:, nearest]
    causal = first_key < first_query + FLEX_TILE
    touched = (by_slashes | by_verticals[:, None]) & causal
    counts = touched.sum(-1, dtype=torch.int32)
    order = touched.to(torch.int8).argsort(dim=-1, descending=True, stable=True).to(torch.int32)

    def cell(_: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        offset = row + history - column
        on_line = lines.verticals[head, column] | lines.slashes[head, offset.clamp(min=0)]
        return on_line & (offset >= 0)

    mask: BlockMask = BlockMask.from_kv_blocks(
        counts[None], order[None], BLOCK_SIZE=FLEX_TILE, mask_mod=cell, seq_lengths=(new, total)
    )
    return mask
