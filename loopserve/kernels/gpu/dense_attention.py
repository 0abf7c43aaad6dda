"""Compute dense attention on a GPU: with PyTorch's fused kernels where they support the case, else with a tiled kernel.

A tile of rows iterates over the keys that any of its rows sees. Cells are masked only at both ends of that range.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from loopserve.kernels.gpu.launch import (
    attention_tile,
    launch,
    readable,
    row_strides,
    score_factors,
    tile_options,
)
from loopserve.kernels.gpu.tiles import empty_result, empty_softmax, finished, load_rows, spans, store_rows


@triton.jit(do_not_specialize=["rows", "total", "group", "window"])
def dense_kernel(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    output: tl.tensor,
    lse: tl.tensor,
    columns: tl.tensor,
    first_valid: tl.tensor,
    q_head: tl.tensor,
    q_row: tl.tensor,
    k_head: tl.tensor,
    k_row: tl.tensor,
    v_head: tl.tensor,
    v_row: tl.tensor,
    rows: tl.tensor,
    total: tl.tensor,
    group: tl.tensor,
    window: tl.tensor,
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
    HAS_FILLER: tl.constexpr,
    WINDOWED: tl.constexpr,
    ANYWHERE: tl.constexpr,
) -> None:
    """Compute dense attention of one tile of rows. Grid: tiles of rows, query heads.

    The last tiles, which see the most keys, start first. WINDOWED: rows do not see all keys from the first on.
    ANYWHERE: the columns of the rows are loaded.
    """
    head = tl.program_id(1).to(tl.int64)
    start = (tl.num_programs(0) - 1 - tl.program_id(0)) * ROWS
    row = start + tl.arange(0, ROWS)
    inside = row < rows
    if ANYWHERE:
        column = tl.load(columns + row, mask=inside, other=0).to(tl.int32)
        lowest = tl.min(tl.where(inside, column, total), 0)
        highest = tl.max(column, 0)
    else:
        column = total - rows + row
        lowest = total - rows + start
        highest = tl.minimum(total - rows + start + ROWS, total) - 1
    oldest = tl.maximum(column - window + 1, 0)
    begin = tl.maximum(lowest - window + 1, 0)
    clear = tl.maximum(highest - window + 1, 0)  # from here to the lowest row's column every row sees every key
    if HAS_FILLER:
        filler = tl.load(first_valid + head // group).to(tl.int32)
        oldest = tl.maximum(oldest, filler)
        begin = tl.maximum(begin, filler)
        clear = tl.maximum(clear, filler)
    end = highest + 1
    clear = tl.minimum(clear, end)
    q_tile = load_rows(q + head * q_head, row, q_row, inside, CHANNELS, PADDED)
    keys_at = k + head // group * k_head
    values_at = v + head // group * v_head
    acc, sums, peak = empty_softmax(ROWS, VALUE_PADDED)
    whole = clear + tl.maximum(lowest + 1 - clear, 0) // KEYS * KEYS
    if WINDOWED:
        acc, sums, peak = spans(
            acc, sums, peak, q_tile, keys_at, values_at, k_row, v_row, begin, clear, oldest, column, inner, outer,
            KEYS, CHANNELS, PADDED, VALUE_CHANNELS, VALUE_PADDED, SOFTCAP, PRECISION, True,
        )  # fmt: skip
    acc, sums, peak = spans(
        acc, sums, peak, q_tile, keys_at, values_at, k_row, v_row, clear, whole, oldest, column, inner, outer,
        KEYS, CHANNELS, PADDED, VALUE_CHANNELS, VALUE_PADDED, SOFTCAP, PRECISION, False,
    )  # fmt: skip
    acc, sums, peak = spans(
        acc, sums, peak, q_tile, keys_at, values_at, k_row, v_row, whole, end, oldest, column, inner, outer,
        KEYS, CHANNELS, PADDED, VALUE_CHANNELS, VALUE_PADDED, SOFTCAP, PRECISION, True,
    )  # fmt: skip
    found, found_lse = finished(acc, sums, peak)
    target = output + head * rows * VALUE_CHANNELS
    store_rows(target, row, VALUE_CHANNELS, inside, found, VALUE_CHANNELS, VALUE_PADDED)
    tl.store(lse + head * rows + row, found_lse, mask=inside)


def dense_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    scaling: float,
    softcap: float | None = None,
    window: int | None = None,
    columns: Tensor | None = None,
    first_valid: Tensor | None = None,
    need_lse: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """See the operation."""
    rows, total = queries.shape[1], keys.shape[1]
    plain = columns is None and first_valid is None and not softcap and (window is None or window >= total)
    # For float32 with grouped heads PyTorch would materialise the whole score matrix.
    fused = queries.is_cuda and queries.dtype in (torch.float16, torch.bfloat16) and values.shape[2] == queries.shape[2]
    if plain and fused and not need_lse and rows in (1, total):
        output = scaled_dot_product_attention(
            queries[None], keys[None], values[None], is_causal=rows > 1, scale=scaling, enable_gqa=True
        )
        return output[0], None
    return _tiled(queries, keys, values, scaling, softcap, window, columns, first_valid)


def _tiled(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    scaling: float,
    softcap: float | None,
    window: int | None,
    columns: Tensor | None,
    first_valid: Tensor | None,
) -> tuple[Tensor, Tensor]:
    queries, keys, values = readable(queries), readable(keys), readable(values)
    heads, rows = queries.shape[:2]
    total, value_channels = keys.shape[1], values.shape[2]
    shape = attention_tile(queries, value_channels)
    output, lse = empty_result(heads, rows, value_channels, dtype=queries.dtype, device=queries.device)
    launch(
        dense_kernel,
        (-(-rows // shape.rows), heads),
        queries,
        keys,
        values,
        output,
        lse,
        lse if columns is None else columns.contiguous(),
        lse if first_valid is None else first_valid.contiguous(),
        *row_strides(queries, keys, values),
        rows,
        total,
        heads // keys.shape[0],
        total if window is None else min(window, total),
        *score_factors(scaling, softcap),
        ROWS=shape.rows,
        KEYS=shape.keys,
        HAS_FILLER=first_valid is not None,
        WINDOWED=window is not None,
        ANYWHERE=columns is not None,
        **tile_options(queries, value_channels, shape, softcap),
    )
    return output, lse
