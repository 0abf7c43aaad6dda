"""Compute attention of a few queries on a GPU: the heads of a group are rows of one tile, and the keys are split over
programs.

The number of parts follows from shapes alone, so that a step can be captured in a CUDA graph. With the active set at
the end of a buffer of constant size, ``first_valid`` gives its length on the device.

Chosen columns are read in place: a program counts slots, first the S chosen columns, then the tail. A row spans whole
cache lines, so scattered rows cost no more bytes than adjacent ones.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from loopserve.kernels.gpu.dense_attention import dense_attention
from loopserve.kernels.gpu.launch import (
    Tile,
    attention_tile,
    launch,
    located,
    padded,
    processors,
    score_factors,
    tile_options,
)
from loopserve.kernels.gpu.tiles import (
    empty_result,
    empty_softmax,
    finished,
    load_rows,
    merge_parts,
    scored,
    spans,
    store_rows,
    taken_in,
)
from loopserve.kernels.paged import Rows, gathered

_LEAST_KEYS = 256  # per part


class Split(NamedTuple):
    """Describe how the slots of one session are split: ``parts`` parts of ``slots`` slots."""

    parts: int
    slots: int


@triton.jit
def attend_slots(
    q_tile: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    k_row: tl.tensor,
    v_row: tl.tensor,
    columns: tl.tensor,
    first: tl.tensor,
    row: tl.tensor,
    rows: tl.tensor,
    total: tl.tensor,
    chosen: tl.tensor,
    tail: tl.tensor,
    begin: tl.tensor,
    part_slots: tl.tensor,
    inner: tl.tensor,
    outer: tl.tensor,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    CHANNELS: tl.constexpr,
    PADDED: tl.constexpr,
    VALUE_CHANNELS: tl.constexpr,
    VALUE_PADDED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
    HAS_COLUMNS: tl.constexpr,
    table: tl.tensor = None,
    k_block: tl.tensor = None,
    v_block: tl.tensor = None,
    SIZE: tl.constexpr = 0,
) -> tl.tensor:
    """Return output and natural log-sum-exp of the rows over at most ``part_slots`` slots from ``begin`` on.

    k, v, columns: addresses of the first element of one KV head, with a block table (see ``tiles.offsets``) of its part of
    block 0. first: columns before it are filler. Row i of the tile
    is the query of column ``total - rows + row[i] % rows``.
    """
    column = total - rows + row % rows
    acc, sums, peak = empty_softmax(ROWS, VALUE_PADDED)
    end = tl.minimum(begin + part_slots, chosen + total - tail)
    if HAS_COLUMNS:
        last = tl.minimum(end, chosen)
        for slot0 in range(begin, last, KEYS):
            slot = slot0 + tl.arange(0, KEYS)
            taken = tl.load(columns + slot, mask=slot < last, other=-1)
            # Negative entries are padding. Entries from the tail on are skipped too, so that a wrong index reads nothing outside.
            held = (taken >= 0) & (taken < tail)
            k_tile = load_rows(k, taken, k_row, held, CHANNELS, PADDED, table, k_block, SIZE)
            v_tile = load_rows(v, taken, v_row, held, VALUE_CHANNELS, VALUE_PADDED, table, v_block, SIZE)
            scores = scored(q_tile, k_tile, inner, outer, SOFTCAP, PRECISION)
            scores = tl.where(held[None, :], scores, float("-inf"))
            acc, sums, peak = taken_in(acc, sums, peak, scores, v_tile, PRECISION)
        begin, end = tail + tl.maximum(begin - chosen, 0), tail + tl.maximum(end - chosen, 0)
    begin = tl.maximum(begin, first)
    clear = tl.minimum(end, total - rows + 1)  # every row sees every key before it
    whole = begin + tl.maximum(clear - begin, 0) // KEYS * KEYS
    acc, sums, peak = spans(
        acc, sums, peak, q_tile, k, v, k_row, v_row, begin, whole, row, column,
        inner, outer, KEYS, CHANNELS, PADDED, VALUE_CHANNELS, VALUE_PADDED, SOFTCAP, PRECISION, False,
        table, k_block, v_block, SIZE,
    )  # fmt: skip
    acc, sums, peak = spans(
        acc, sums, peak, q_tile, k, v, k_row, v_row, whole, end, row * 0, column,
        inner, outer, KEYS, CHANNELS, PADDED, VALUE_CHANNELS, VALUE_PADDED, SOFTCAP, PRECISION, True,
        table, k_block, v_block, SIZE,
    )  # fmt: skip
    return finished(acc, sums, peak)


@triton.jit(do_not_specialize=["rows", "total", "chosen", "tail", "part_slots"])
def decode_kernel(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    output: tl.tensor,
    lse: tl.tensor,
    first_valid: tl.tensor,
    columns: tl.tensor,
    k_head: tl.tensor,
    k_row: tl.tensor,
    v_head: tl.tensor,
    v_row: tl.tensor,
    rows: tl.tensor,
    total: tl.tensor,
    chosen: tl.tensor,
    tail: tl.tensor,
    part_slots: tl.tensor,
    inner: tl.tensor,
    outer: tl.tensor,
    table: tl.tensor,
    k_block: tl.tensor,
    v_block: tl.tensor,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    GROUP: tl.constexpr,
    CHANNELS: tl.constexpr,
    PADDED: tl.constexpr,
    VALUE_CHANNELS: tl.constexpr,
    VALUE_PADDED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
    HAS_FILLER: tl.constexpr,
    HAS_COLUMNS: tl.constexpr,
    SPLIT: tl.constexpr,
    SIZE: tl.constexpr,
) -> None:
    """Compute attention of one tile of rows over one part of the slots. Grid: parts, KV heads, tiles of rows.

    SPLIT: output and lse hold parts of ROWS rows, else ``[Hkv, GROUP * rows]``. Slots are the ``chosen`` columns
    ``[Hkv, chosen]`` and those from ``tail`` on; without HAS_COLUMNS all columns. table, k_block, v_block, SIZE: see
    ``tiles.offsets``.
    """
    part = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    tile = tl.program_id(2)
    row = tile * ROWS + tl.arange(0, ROWS)
    inside = row < GROUP * rows
    q_tile = load_rows(q + head * GROUP * rows * CHANNELS, row, CHANNELS, inside, CHANNELS, PADDED)
    first_column = 0
    if HAS_FILLER:
        first_column = tl.load(first_valid + head).to(tl.int32)
    found, found_lse = attend_slots(
        q_tile, k + head * k_head, v + head * v_head, k_row, v_row, columns + head * chosen, first_column,
        row, rows, total, chosen, tail, part * part_slots, part_slots, inner, outer,
        ROWS, KEYS, CHANNELS, PADDED, VALUE_CHANNELS, VALUE_PADDED, SOFTCAP, PRECISION, HAS_COLUMNS,
        table, k_block, v_block, SIZE,
    )  # fmt: skip
    if SPLIT:
        row, kept = tl.arange(0, ROWS), row >= 0
        first = ((head * tl.num_programs(2) + tile) * tl.num_programs(0) + part) * ROWS
    else:
        first, kept = head * GROUP * rows, inside
    target = output + first * VALUE_CHANNELS
    store_rows(target, row, VALUE_CHANNELS, kept, found, VALUE_CHANNELS, VALUE_PADDED)
    tl.store(lse + first + row, found_lse, mask=kept)


def split(slots: int, programs: int, shape: Tile, device: torch.device) -> Split:
    """Split the slots of a session with ``programs`` tiles of rows into enough parts to occupy the device alone."""
    parts = min(-(-2 * processors(device) // programs), -(-slots // _LEAST_KEYS))
    part_slots = -(-slots // (parts * shape.keys)) * shape.keys
    return Split(-(-slots // part_slots), part_slots)


def decode_attention(
    queries: Tensor,
    keys: Rows,
    values: Rows,
    *,
    scaling: float,
    softcap: float | None = None,
    first_valid: Tensor | None = None,
    columns: Tensor | None = None,
    tail: int = 0,
    need_lse: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """See the operation."""
    heads, rows = queries.shape[:2]
    owners, total, value_channels = values.shape
    group = heads // owners
    shape = attention_tile(queries, value_channels)
    if columns is None and group * rows > shape.rows:  # enough rows to occupy the device without splitting keys
        return dense_attention(
            queries,
            *gathered(keys, values),
            scaling=scaling,
            softcap=softcap,
            first_valid=first_valid,
            need_lse=need_lse,
        )
    queries, (store, strides, in_blocks) = queries.contiguous(), located(keys, values)
    shape = shape._replace(rows=min(shape.rows, padded(group * rows)))
    tiles = -(-group * rows // shape.rows)
    chosen = 0 if columns is None else columns.shape[1]
    slots = chosen + total - tail
    parts, part_slots = split(slots, owners * tiles, shape, queries.device)
    output, lse = empty_result(owners, group * rows, value_channels, dtype=queries.dtype, device=queries.device)
    found, found_lse = output, lse
    if parts > 1:
        found, found_lse = empty_result(
            owners * tiles * parts, shape.rows, value_channels, dtype=torch.float32, device=queries.device
        )
    launch(
        decode_kernel,
        (parts, owners, tiles),
        queries,
        *store,
        found,
        found_lse,
        lse if first_valid is None else first_valid.contiguous(),
        lse if columns is None else columns.contiguous(),
        *strides,
        rows,
        total,
        chosen,
        tail,
        part_slots,
        *score_factors(scaling, softcap),
        *in_blocks[:3],
        ROWS=shape.rows,
        KEYS=shape.keys,
        GROUP=group,
        HAS_FILLER=first_valid is not None,
        HAS_COLUMNS=columns is not None,
        SPLIT=parts > 1,
        SIZE=in_blocks.size,
        **tile_options(queries, value_channels, shape, softcap),
    )
    if parts > 1:
        merge_parts(found, found_lse, output, lse, tile_rows=shape.rows, parts=parts)
    return output.view(heads, rows, value_channels), lse.view(heads, rows)
