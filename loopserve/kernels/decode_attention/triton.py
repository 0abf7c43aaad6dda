"""Attention of a few queries on a GPU: the heads of a group are rows of one tile, the keys are split over programs.

How many parts there are follows from shapes alone, so a step can be captured in a CUDA graph: with the active set at
the end of a buffer of constant size, ``first_valid`` says on the device how much of it is held. Several sessions are
served in one call as so many more heads: queries ``[B * Hq, t, D]``, keys and values ``[B * Hkv, S, D]``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from loopserve.kernels.dense_attention.triton import dense_attention
from loopserve.kernels.gather_kv.triton import gather_kv
from loopserve.kernels.gpu.launch import (
    attention_tile,
    launch,
    padded,
    precision,
    processors,
    readable,
    score_factors,
)
from loopserve.kernels.gpu.merge import merge_parts
from loopserve.kernels.gpu.tiles import finished, load_rows, spans, store_rows

_LEAST_KEYS = 256  # per part


@triton.jit(do_not_specialize=["rows", "total", "part_keys"])
def decode_kernel(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    output: tl.tensor,
    lse: tl.tensor,
    first_valid: tl.tensor,
    k_head: tl.tensor,
    k_row: tl.tensor,
    v_head: tl.tensor,
    v_row: tl.tensor,
    rows: tl.tensor,
    total: tl.tensor,
    part_keys: tl.tensor,
    inner: tl.tensor,
    outer: tl.tensor,
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
    SPLIT: tl.constexpr,
) -> None:
    """Grid: parts of the keys, KV heads. SPLIT: output and lse are parts of ROWS rows, else ``[Hkv, GROUP * rows]``."""
    part = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    row = tl.arange(0, ROWS)
    inside = row < GROUP * rows
    column = total - rows + row % rows
    begin = part * part_keys
    end = tl.minimum(begin + part_keys, total)
    if HAS_FILLER:
        begin = tl.maximum(begin, tl.load(first_valid + head).to(tl.int32))
    clear = tl.minimum(end, total - rows + 1)  # before it every row sees every key
    whole = begin + tl.maximum(clear - begin, 0) // KEYS * KEYS
    q_tile = load_rows(q + head * GROUP * rows * CHANNELS, row, CHANNELS, inside, CHANNELS, PADDED)
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    sums = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, VALUE_PADDED], tl.float32)
    acc, sums, peak = spans(
        acc, sums, peak, q_tile, k + head * k_head, v + head * v_head, k_row, v_row, begin, whole, row, column,
        inner, outer, KEYS, CHANNELS, PADDED, VALUE_CHANNELS, VALUE_PADDED, SOFTCAP, PRECISION, False,
    )  # fmt: skip
    acc, sums, peak = spans(
        acc, sums, peak, q_tile, k + head * k_head, v + head * v_head, k_row, v_row, whole, end, row * 0, column,
        inner, outer, KEYS, CHANNELS, PADDED, VALUE_CHANNELS, VALUE_PADDED, SOFTCAP, PRECISION, True,
    )  # fmt: skip
    found, found_lse = finished(acc, sums, peak)
    if SPLIT:
        first, kept = (head * tl.num_programs(0) + part) * ROWS, row >= 0
    else:
        first, kept = head * GROUP * rows, inside
    target = output + first * VALUE_CHANNELS
    store_rows(target, row, VALUE_CHANNELS, kept, found, VALUE_CHANNELS, VALUE_PADDED)
    tl.store(lse + first + row, found_lse, mask=kept)


def decode_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    scaling: float,
    softcap: float | None = None,
    first_valid: Tensor | None = None,
    columns: Tensor | None = None,
    tail: int = 0,
    need_lse: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """See the package. Chosen columns are copied together first."""
    if columns is not None:
        first_valid = (columns < 0).sum(1)
        copies = gather_kv(keys, values, columns.clamp(min=0))
        keys, values = (
            torch.cat([copy, whole[:, tail:]], dim=1) for copy, whole in zip(copies, (keys, values), strict=True)
        )
    heads, rows, channels = queries.shape
    owners, total, value_channels = values.shape
    group = heads // owners
    shape = attention_tile(queries, value_channels)
    if group * rows > shape.rows:  # enough rows to share the work out without splitting keys
        return dense_attention(
            queries, keys, values, scaling=scaling, softcap=softcap, first_valid=first_valid, need_lse=need_lse
        )
    queries, keys, values = queries.contiguous(), readable(keys), readable(values)
    shape = shape._replace(rows=padded(group * rows))
    parts = min(-(-2 * processors(queries.device) // owners), -(-total // _LEAST_KEYS))
    part_keys = -(-total // (parts * shape.keys)) * shape.keys
    parts = -(-total // part_keys)
    output = queries.new_empty(owners, group * rows, value_channels)
    lse = torch.empty(owners, group * rows, device=queries.device)
    found, found_lse = output, lse
    if parts > 1:
        found = torch.empty(owners * parts, shape.rows, value_channels, device=queries.device)
        found_lse = torch.empty(owners * parts, shape.rows, device=queries.device)
    launch(
        decode_kernel,
        (parts, owners),
        queries,
        keys,
        values,
        found,
        found_lse,
        lse if first_valid is None else first_valid.contiguous(),
        keys.stride(0),
        keys.stride(1),
        values.stride(0),
        values.stride(1),
        rows,
        total,
        part_keys,
        *score_factors(scaling, softcap),
        ROWS=shape.rows,
        KEYS=shape.keys,
        GROUP=group,
        CHANNELS=channels,
        PADDED=padded(channels),
        VALUE_CHANNELS=value_channels,
        VALUE_PADDED=padded(value_channels),
        SOFTCAP=bool(softcap),
        PRECISION=precision(queries.dtype),
        HAS_FILLER=first_valid is not None,
        SPLIT=parts > 1,
        num_warps=shape.warps,
        num_stages=shape.stages,
    )
    if parts > 1:
        merge_parts(found, found_lse, output, lse, tile_rows=shape.rows, parts=parts)
    return output.view(heads, rows, value_channels), lse.view(heads, rows)
