"""Time torch's dense attention on CPU and GPU, as the baseline of our operations, and FlexAttention as a rival.

CPU: ``scaled_dot_product_attention`` in float32 and bfloat16. New tokens after a history are split into past (no mask)
and own block (causal), joined by their log-sum-exps, which is faster than a mask. GPU: event clock and torch's fused
attentions. The GPU code also runs on a CPU for tests, where its times have no meaning.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from loopserve.bench.heads import Heads
from loopserve.bench.speed.candidates import Candidate, Case
from loopserve.bench.speed.paired import Clock, Runner
from loopserve.core.errors import ConfigError
from loopserve.core.policy.patterns import LinePattern
from loopserve.kernels.masked import fused, merge

_CPU_DTYPES = (torch.float32, torch.bfloat16)
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
FLEX_TILE = 128  # FlexAttention's tiles of rows and keys


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
