"""Compute attention of a tile of rows over one part of an active set; inlined into the decode kernels.

Slots number the attended columns: first the chosen columns, then every column from the tail on.
"""

from __future__ import annotations

import triton
import triton.language as tl

from loopserve.kernels.gpu.tiles import finished, load_rows, scored, spans, taken_in


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
) -> tl.tensor:
    """Return output and natural log-sum-exp of the rows over at most ``part_slots`` slots from ``begin`` on.

    k, v, columns: addresses of the first element of one KV head. first: columns before it are filler. Row i of the tile
    is the query of column ``total - rows + row[i] % rows``.
    """
    column = total - rows + row % rows
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    sums = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, VALUE_PADDED], tl.float32)
    end = tl.minimum(begin + part_slots, chosen + total - tail)
    if HAS_COLUMNS:
        last = tl.minimum(end, chosen)
        for slot0 in range(begin, last, KEYS):
            slot = slot0 + tl.arange(0, KEYS)
            taken = tl.load(columns + slot, mask=slot < last, other=-1)
            # Negative entries are padding. Entries from the tail on are skipped too, so that a wrong index reads nothing outside.
            held = (taken >= 0) & (taken < tail)
            k_tile = load_rows(k, taken, k_row, held, CHANNELS, PADDED)
            v_tile = load_rows(v, taken, v_row, held, VALUE_CHANNELS, VALUE_PADDED)
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
    )  # fmt: skip
    acc, sums, peak = spans(
        acc, sums, peak, q_tile, k, v, k_row, v_row, whole, end, row * 0, column,
        inner, outer, KEYS, CHANNELS, PADDED, VALUE_CHANNELS, VALUE_PADDED, SOFTCAP, PRECISION, True,
    )  # fmt: skip
    return finished(acc, sums, peak)
