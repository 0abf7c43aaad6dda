"""Time operations on an NVIDIA GPU: event clock, torch's fused dense attentions, FlexAttention as a rival.

All of it also runs on a CPU for tests, where the times have no meaning.
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
from loopserve.core.errors import ConfigError
from loopserve.core.policy.patterns import LinePattern

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
FLEX_TILE = 128  # FlexAttention's tiles of rows and keys


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
