"""Attention of a few queries on a GPU: the heads of a group are rows of one tile, the keys are split over programs.

How many parts there are follows from shapes alone, so a step can be captured in a CUDA graph: with the active set at
the end of a buffer of constant size, ``first_valid`` says on the device how much of it is held. Several sessions are
served in one call as so many more heads: queries ``[B * Hq, t, D]``, keys and values ``[B * Hkv, S, D]``.

Chosen columns are read where they lie: a program counts slots, first the S chosen ones, then the tail, and reads a
chosen row by its number. A row is a few cache lines, so scattered rows cost no more bytes than neighbours would.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from loopserve.kernels.dense_attention.triton import dense_attention
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
from loopserve.kernels.gpu.tiles import finished, load_rows, scored, spans, store_rows, taken_in

_LEAST_KEYS = 256  # per part


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
) -> None:
    """Grid: parts of the slots, KV heads, tiles of rows. SPLIT: output and lse are parts of ROWS rows, else ``[Hkv, GROUP *
    rows]``. Slots are the ``chosen`` columns ``[Hkv, chosen]`` and those from ``tail`` on; without HAS_COLUMNS all columns.
    """
    part = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    tile = tl.program_id(2)
    row = tile * ROWS + tl.arange(0, ROWS)
    inside = row < GROUP * rows
    column = total - rows + row % rows
    q_tile = load_rows(q + head * GROUP * rows * CHANNELS, row, CHANNELS, inside, CHANNELS, PADDED)
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    sums = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, VALUE_PADDED], tl.float32)
    begin = part * part_slots
    end = tl.minimum(begin + part_slots, chosen + total - tail)
    if HAS_COLUMNS:
        last = tl.minimum(end, chosen)
        for slot0 in range(begin, last, KEYS):
            slot = slot0 + tl.arange(0, KEYS)
            taken = tl.load(columns + head * chosen + slot, mask=slot < last, other=-1)
            # Below 0 stands no column. Nothing beyond the tail either: a wrong index must not read outside.
            held = (taken >= 0) & (taken < tail)
            k_tile = load_rows(k + head * k_head, taken, k_row, held, CHANNELS, PADDED)
            v_tile = load_rows(v + head * v_head, taken, v_row, held, VALUE_CHANNELS, VALUE_PADDED)
            scores = scored(q_tile, k_tile, inner, outer, SOFTCAP, PRECISION)
            scores = tl.where(held[None, :], scores, float("-inf"))
            acc, sums, peak = taken_in(acc, sums, peak, scores, v_tile, PRECISION)
        begin, end = tail + tl.maximum(begin - chosen, 0), tail + tl.maximum(end - chosen, 0)
    if HAS_FILLER:
        begin = tl.maximum(begin, tl.load(first_valid + head).to(tl.int32))
    clear = tl.minimum(end, total - rows + 1)  # before it every row sees every key
    whole = begin + tl.maximum(clear - begin, 0) // KEYS * KEYS
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
        row, kept = tl.arange(0, ROWS), row >= 0
        first = ((head * tl.num_programs(2) + tile) * tl.num_programs(0) + part) * ROWS
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
    """See the package."""
    heads, rows, channels = queries.shape
    owners, total, value_channels = values.shape
    group = heads // owners
    shape = attention_tile(queries, value_channels)
    if columns is None and group * rows > shape.rows:  # enough rows to share the work out without splitting keys
        return dense_attention(
            queries, keys, values, scaling=scaling, softcap=softcap, first_valid=first_valid, need_lse=need_lse
        )
    queries, keys, values = queries.contiguous(), readable(keys), readable(values)
    shape = shape._replace(rows=min(shape.rows, padded(group * rows)))
    tiles = -(-group * rows // shape.rows)
    chosen = 0 if columns is None else columns.shape[1]
    slots = chosen + total - tail
    parts = min(-(-2 * processors(queries.device) // (owners * tiles)), -(-slots // _LEAST_KEYS))
    part_slots = -(-slots // (parts * shape.keys)) * shape.keys
    parts = -(-slots // part_slots)
    output = queries.new_empty(owners, group * rows, value_channels)
    lse = torch.empty(owners, group * rows, dtype=torch.float32, device=queries.device)
    found, found_lse = output, lse
    if parts > 1:
        found = torch.empty(
            owners * tiles * parts, shape.rows, value_channels, dtype=torch.float32, device=queries.device
        )
        found_lse = torch.empty(owners * tiles * parts, shape.rows, dtype=torch.float32, device=queries.device)
    launch(
        decode_kernel,
        (parts, owners, tiles),
        queries,
        keys,
        values,
        found,
        found_lse,
        lse if first_valid is None else first_valid.contiguous(),
        lse if columns is None else columns.contiguous(),
        keys.stride(0),
        keys.stride(1),
        values.stride(0),
        values.stride(1),
        rows,
        total,
        chosen,
        tail,
        part_slots,
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
        HAS_COLUMNS=columns is not None,
        SPLIT=parts > 1,
        num_warps=shape.warps,
        num_stages=shape.stages,
    )
    if parts > 1:
        merge_parts(found, found_lse, output, lse, tile_rows=shape.rows, parts=parts)
    return output.view(heads, rows, value_channels), lse.view(heads, rows)
