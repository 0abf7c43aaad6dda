"""Merge the partial results of rows whose keys were split, weighted by their log-sum-exps."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from loopserve.kernels.gpu.launch import launch, padded
from loopserve.kernels.gpu.tiles import load_rows, store_rows


@triton.jit(do_not_specialize=["rows", "tiles"])
def merge_kernel(
    part_output: tl.tensor,
    part_lse: tl.tensor,
    output: tl.tensor,
    lse: tl.tensor,
    first_part: tl.tensor,
    part_count: tl.tensor,
    rows: tl.tensor,
    tiles: tl.tensor,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    PADDED: tl.constexpr,
    PARTS: tl.constexpr,
) -> None:
    """Merge the parts of one tile of rows.

    PARTS: the number of parts of every tile, in order; 0: the count is loaded, and 1 means already written.
    """
    tile = tl.program_id(0)
    head = tile // tiles
    row = tile % tiles * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    if PARTS == 0:
        first, count = tl.load(first_part + tile), tl.load(part_count + tile)
    else:
        first, count = tile * PARTS, PARTS
    if count > 1:
        within = tl.arange(0, ROWS)
        peak = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        acc = tl.zeros([ROWS, PADDED], tl.float32)
        for part in range(count):
            place = (first + part).to(tl.int64) * ROWS
            found = tl.load(part_lse + place + within)
            higher = tl.maximum(peak, found)
            base = tl.where(higher == float("-inf"), 0.0, higher)
            shrink, weight = tl.exp(peak - base), tl.exp(found - base)
            piece = load_rows(part_output + place * CHANNELS, within, CHANNELS, within >= 0, CHANNELS, PADDED)
            acc = acc * shrink[:, None] + piece * weight[:, None]
            total = total * shrink + weight
            peak = higher
        empty = total == 0.0
        divisor = tl.where(empty, 1.0, total)
        start = head.to(tl.int64) * rows
        store_rows(output + start * CHANNELS, row, CHANNELS, inside, acc / divisor[:, None], CHANNELS, PADDED)
        tl.store(lse + start + row, tl.where(empty, float("-inf"), peak + tl.log(divisor)), mask=inside)


def merge_parts(
    part_output: Tensor,
    part_lse: Tensor,
    output: Tensor,
    lse: Tensor,
    *,
    tile_rows: int,
    first_part: Tensor | None = None,
    part_count: Tensor | None = None,
    parts: int = 0,
) -> None:
    """Write rows ``[H, T, D]`` and ``[H, T]`` (dense) from float32 parts ``[P, tile_rows, D]`` and ``[P, tile_rows]``.

    A tile of rows has ``parts`` consecutive parts, or those that ``first_part`` and ``part_count`` int32 ``[H *
    tiles]`` give. Tiles with one part were written by the kernel that computed it.
    """
    heads, rows, channels = output.shape
    tiles = -(-rows // tile_rows)
    unused = part_lse  # a valid pointer where nothing is read
    launch(
        merge_kernel,
        (heads * tiles,),
        part_output,
        part_lse,
        output,
        lse,
        unused if first_part is None else first_part,
        unused if part_count is None else part_count,
        rows,
        tiles,
        ROWS=tile_rows,
        CHANNELS=channels,
        PADDED=padded(channels),
        PARTS=parts,
        num_warps=4,
    )
