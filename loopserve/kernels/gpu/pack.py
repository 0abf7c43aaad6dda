"""Copy chosen columns into contiguous memory, so that attention reads them like adjacent keys."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from loopserve.kernels.gpu.launch import launch, padded
from loopserve.kernels.gpu.tiles import load_rows, store_rows


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
    CHANNELS: tl.constexpr,
    PADDED: tl.constexpr,
    VALUE_CHANNELS: tl.constexpr,
    VALUE_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Copy the chosen columns of a query head's keys and values. Grid: blocks of columns, query heads."""
    head = tl.program_id(1).to(tl.int64)
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    held = slot < tl.load(count + head * count_step)
    column = tl.load(columns + head * total + slot, mask=held, other=0)
    k_tile = load_rows(k + head // group * k_head, column, k_row, held, CHANNELS, PADDED)
    v_tile = load_rows(v + head // group * v_head, column, v_row, held, VALUE_CHANNELS, VALUE_PADDED)
    store_rows(packed_k + head * capacity * CHANNELS, slot, CHANNELS, held, k_tile, CHANNELS, PADDED)
    store_rows(
        packed_v + head * capacity * VALUE_CHANNELS, slot, VALUE_CHANNELS, held, v_tile, VALUE_CHANNELS, VALUE_PADDED
    )


def packed_columns(
    keys: Tensor, values: Tensor, columns: Tensor, count: Tensor, capacity: int, *, block: int
) -> tuple[Tensor, Tensor]:
    """Return keys ``[Hq, capacity, D]`` and values of the first ``count`` int32 ``[Hq]`` of ``columns`` int32 ``[Hq,
    n]``.

    Copies from keys and values ``[Hkv, n, D]``. ``capacity`` is a multiple of ``block``. Columns beyond it are left
    out, and unused slots stay uninitialised.
    """
    heads, total = columns.shape
    packed_keys = keys.new_empty(heads, capacity, keys.shape[2])
    packed_values = values.new_empty(heads, capacity, values.shape[2])
    launch(
        pack_columns_kernel,
        (capacity // block, heads),
        keys,
        values,
        columns,
        count,
        packed_keys,
        packed_values,
        keys.stride(0),
        keys.stride(1),
        values.stride(0),
        values.stride(1),
        total,
        capacity,
        heads // keys.shape[0],
        count.stride(0),
        CHANNELS=keys.shape[2],
        PADDED=padded(keys.shape[2]),
        VALUE_CHANNELS=values.shape[2],
        VALUE_PADDED=padded(values.shape[2]),
        BLOCK=block,
        num_warps=4,
    )
    return packed_keys, packed_values
