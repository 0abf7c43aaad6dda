"""Compute block-sparse attention on a GPU: a persistent kernel iterates over the list of key tiles of each query tile."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from loopserve.kernels.gpu.launch import (
    attention_tile,
    launch,
    readable,
    row_strides,
    score_factors,
    tile_options,
)
from loopserve.kernels.gpu.tiles import (
    empty_result,
    empty_softmax,
    load_rows,
    merge_parts,
    scored,
    store_item,
    taken_in,
)
from loopserve.kernels.gpu.work import compacted, load_item, work_list


@triton.jit(do_not_specialize=["rows", "total", "tiles", "group"])
def block_sparse_kernel(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    output: tl.tensor,
    lse: tl.tensor,
    part_output: tl.tensor,
    part_lse: tl.tensor,
    blocks: tl.tensor,
    block_starts: tl.tensor,
    items: tl.tensor,
    item_count: tl.tensor,
    first_valid: tl.tensor,
    q_head: tl.tensor,
    q_row: tl.tensor,
    k_head: tl.tensor,
    k_row: tl.tensor,
    v_head: tl.tensor,
    v_row: tl.tensor,
    rows: tl.tensor,
    total: tl.tensor,
    tiles: tl.tensor,
    group: tl.tensor,
    inner: tl.tensor,
    outer: tl.tensor,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    TILE: tl.constexpr,
    CHANNELS: tl.constexpr,
    PADDED: tl.constexpr,
    VALUE_CHANNELS: tl.constexpr,
    VALUE_PADDED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
    HAS_FILLER: tl.constexpr,
) -> None:
    """Compute attention over the keys of the listed blocks, KEYS per step.

    A block of TILE rows is split into tiles of ROWS rows.
    """
    row = tl.arange(0, ROWS)
    key = tl.arange(0, KEYS)
    for item in range(tl.program_id(0), tl.load(item_count), tl.num_programs(0)):
        row_tile, begin, end, part = load_item(items, item)
        head = (row_tile // tiles).to(tl.int64)
        start = row_tile % tiles * ROWS
        inside = start + row < rows
        column = total - rows + start + row
        q_tile = load_rows(q + head * q_head, start + row, q_row, inside, CHANNELS, PADDED)
        oldest = 0
        if HAS_FILLER:
            oldest = tl.load(first_valid + head // group).to(tl.int32)
        blocks_per_head = (rows + TILE - 1) // TILE
        listed = blocks + tl.load(block_starts + head * blocks_per_head + start // TILE)
        acc, sums, peak = empty_softmax(ROWS, VALUE_PADDED)
        for step in range(begin, end):
            block = tl.load(listed + step // (TILE // KEYS))
            keys = block * TILE + step % (TILE // KEYS) * KEYS + key
            held = (keys >= oldest) & (keys < total)
            k_tile = load_rows(k + head // group * k_head, keys, k_row, held, CHANNELS, PADDED)
            v_tile = load_rows(v + head // group * v_head, keys, v_row, held, VALUE_CHANNELS, VALUE_PADDED)
            scores = scored(q_tile, k_tile, inner, outer, SOFTCAP, PRECISION)
            seen = held[None, :] & (keys[None, :] <= column[:, None])
            acc, sums, peak = taken_in(acc, sums, peak, tl.where(seen, scores, float("-inf")), v_tile, PRECISION)
        store_item(
            output, lse, part_output, part_lse, acc, sums, peak, head, start, rows, part,
            ROWS, VALUE_CHANNELS, VALUE_PADDED,
        )  # fmt: skip


def block_sparse(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    blocks: Tensor,
    *,
    tile: int,
    scaling: float,
    softcap: float | None,
    first_valid: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See the operation."""
    queries, keys, values = readable(queries), readable(keys), readable(values)
    heads, rows = queries.shape[:2]
    total, value_channels, group = keys.shape[1], values.shape[2], heads // keys.shape[0]
    shape = attention_tile(queries, value_channels)
    tile_rows, tile_keys = min(shape.rows, tile), min(shape.keys, tile)
    visible, listed = _visible(blocks, rows, total, tile)
    counts = visible.sum(2, dtype=torch.int32).view(-1)
    starts = counts.cumsum(0) - counts
    indices = torch.empty(heads * listed, dtype=torch.int32, device=queries.device)
    compacted(visible.view(len(counts), -1), starts, indices)
    tiles = -(-rows // tile_rows)
    steps = (counts * (tile // tile_keys)).view(heads, -1)
    # A block of rows may consist of several tiles. The last block may have fewer rows.
    steps = steps[:, :, None].expand(-1, -1, tile // tile_rows).reshape(heads, -1)[:, :tiles].reshape(-1)
    work = work_list(steps)
    output, lse = empty_result(heads, rows, value_channels, dtype=queries.dtype, device=queries.device)
    part_output, part_lse = empty_result(
        work.parts, tile_rows, value_channels, dtype=torch.float32, device=queries.device
    )
    launch(
        block_sparse_kernel,
        (work.programs,),
        queries,
        keys,
        values,
        output,
        lse,
        part_output,
        part_lse,
        indices,
        starts,
        work.items,
        work.count,
        lse if first_valid is None else first_valid,
        *row_strides(queries, keys, values),
        rows,
        total,
        tiles,
        group,
        *score_factors(scaling, softcap),
        ROWS=tile_rows,
        KEYS=tile_keys,
        TILE=tile,
        HAS_FILLER=first_valid is not None,
        **tile_options(queries, value_channels, shape, softcap),
    )
    merge_parts(
        part_output,
        part_lse,
        output,
        lse,
        tile_rows=tile_rows,
        first_part=work.first_part,
        part_count=work.part_count,
    )
    return output, lse


def _visible(blocks: Tensor, rows: int, total: int, tile: int) -> tuple[Tensor, int]:
    """Return the blocks without those after all rows of their query tile, and the largest possible number of blocks per
    head.
    """
    numbers = range(blocks.shape[1])
    seen = [-(-min(total - rows + (number + 1) * tile, total) // tile) for number in numbers]
    last = torch.arange(1, blocks.shape[1] + 1, device=blocks.device) * tile + (total - rows)
    key = torch.arange(blocks.shape[2], device=blocks.device) * tile
    return blocks & (key < last[:, None]), sum(seen)
