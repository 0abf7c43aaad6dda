"""Copy pairs on a GPU: one kernel for keys and values, whole rows at a time."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from loopserve.kernels.gpu.launch import Located, launch, padded, readable
from loopserve.kernels.gpu.tiles import load_rows, store_rows

_ROWS = 32


@triton.jit(do_not_specialize=["total", "chosen"])
def gather_kernel(
    k: tl.tensor,
    v: tl.tensor,
    indices: tl.tensor,
    key_copies: tl.tensor,
    value_copies: tl.tensor,
    k_head: tl.tensor,
    k_row: tl.tensor,
    v_head: tl.tensor,
    v_row: tl.tensor,
    index_head: tl.tensor,
    index_step: tl.tensor,
    total: tl.tensor,
    chosen: tl.tensor,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    PADDED: tl.constexpr,
    VALUE_CHANNELS: tl.constexpr,
    VALUE_PADDED: tl.constexpr,
) -> None:
    """Copy rows. Grid: blocks of chosen columns, KV heads. A column out of range is not read and gives NaN."""
    head = tl.program_id(1).to(tl.int64)
    slot = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = slot < chosen
    column = tl.load(indices + head * index_head + slot.to(tl.int64) * index_step, mask=inside, other=-1)
    there = (column >= 0) & (column < total)
    channel = tl.arange(0, PADDED)[None, :]
    places = k + head * k_head + column[:, None] * k_row + channel
    tile = tl.load(places, mask=there[:, None] & (channel < CHANNELS), other=float("nan"))
    store_rows(key_copies + head * chosen * CHANNELS, slot, CHANNELS, inside, tile, CHANNELS, PADDED)
    channel = tl.arange(0, VALUE_PADDED)[None, :]
    places = v + head * v_head + column[:, None] * v_row + channel
    tile = tl.load(places, mask=there[:, None] & (channel < VALUE_CHANNELS), other=float("nan"))
    store_rows(
        value_copies + head * chosen * VALUE_CHANNELS, slot, VALUE_CHANNELS, inside, tile, VALUE_CHANNELS, VALUE_PADDED
    )


def gather_kv(keys: Tensor, values: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """See the operation. Index ranges are not checked, since that would synchronise with the device."""
    keys, values = readable(keys), readable(values)
    heads, chosen = indices.shape
    key_copies = keys.new_empty(heads, chosen, keys.shape[2])
    value_copies = values.new_empty(heads, chosen, values.shape[2])
    if chosen:
        launch(
            gather_kernel,
            (-(-chosen // _ROWS), heads),
            keys,
            values,
            indices,
            key_copies,
            value_copies,
            keys.stride(0),
            keys.stride(1),
            values.stride(0),
            values.stride(1),
            indices.stride(0),
            indices.stride(1),
            keys.shape[1],
            chosen,
            ROWS=_ROWS,
            CHANNELS=keys.shape[2],
            PADDED=padded(keys.shape[2]),
            VALUE_CHANNELS=values.shape[2],
            VALUE_PADDED=padded(values.shape[2]),
            num_warps=4,
        )
    return key_copies, value_copies


@triton.jit(do_not_specialize=["total", "capacity", "group", "count_step"])
def pack_columns_kernel(
    k: tl.tensor,
    v: tl.tensor,
    columns: tl.tensor,
    count: tl.tensor,
    packed_k: tl.tensor,
    packed_v: tl.tensor,
    k_head: tl.tensor,
    k_row: tl.tensor,
    v_head: tl.tensor,
    v_row: tl.tensor,
    total: tl.tensor,
    capacity: tl.tensor,
    group: tl.tensor,
    count_step: tl.tensor,
    table: tl.tensor,
    k_block: tl.tensor,
    v_block: tl.tensor,
    CHANNELS: tl.constexpr,
    PADDED: tl.constexpr,
    VALUE_CHANNELS: tl.constexpr,
    VALUE_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    SIZE: tl.constexpr,
) -> None:
    """Copy the chosen columns of a query head's keys and values. Grid: blocks of columns, query heads.

    table, k_block, v_block, SIZE: see ``tiles.offsets``.
    """
    head = tl.program_id(1).to(tl.int64)
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    held = slot < tl.load(count + head * count_step)
    column = tl.load(columns + head * total + slot, mask=held, other=0)
    k_tile = load_rows(k + head // group * k_head, column, k_row, held, CHANNELS, PADDED, table, k_block, SIZE)
    v_tile = load_rows(
        v + head // group * v_head, column, v_row, held, VALUE_CHANNELS, VALUE_PADDED, table, v_block, SIZE
    )
    store_rows(packed_k + head * capacity * CHANNELS, slot, CHANNELS, held, k_tile, CHANNELS, PADDED)
    store_rows(
        packed_v + head * capacity * VALUE_CHANNELS, slot, VALUE_CHANNELS, held, v_tile, VALUE_CHANNELS, VALUE_PADDED
    )


def packed_columns(
    place: Located, columns: Tensor, count: Tensor, capacity: int, *, block: int
) -> tuple[Tensor, Tensor]:
    """Return keys ``[Hq, capacity, D]`` and values of the first ``count`` int32 ``[Hq]`` of ``columns`` int32 ``[Hq,
    n]``.

    Copies from keys and values ``[Hkv, n, D]`` at ``place``. ``capacity`` is a multiple of ``block``. Columns beyond it are left
    out, and unused slots stay uninitialised.
    """
    (keys, values), strides, in_blocks = place
    heads, total = columns.shape
    packed_keys = keys.new_empty(heads, capacity, keys.shape[-1])
    packed_values = values.new_empty(heads, capacity, values.shape[-1])
    launch(
        pack_columns_kernel,
        (capacity // block, heads),
        keys,
        values,
        columns,
        count,
        packed_keys,
        packed_values,
        *strides,
        total,
        capacity,
        heads // keys.shape[0],
        count.stride(0),
        *in_blocks[:3],
        CHANNELS=keys.shape[-1],
        PADDED=padded(keys.shape[-1]),
        VALUE_CHANNELS=values.shape[-1],
        VALUE_PADDED=padded(values.shape[-1]),
        BLOCK=block,
        SIZE=in_blocks.size,
        num_warps=4,
    )
    return packed_keys, packed_values
