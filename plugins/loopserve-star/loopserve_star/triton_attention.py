"""Compute star attention in one Triton kernel: a tile of rows reads the keys of the anchor, then those from the block
of its first row on.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS = 64
_KEYS = 64


@triton.jit
def _walk(
    queries: tl.tensor,
    column: tl.tensor,
    block_begin: tl.tensor,
    filler: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    key_row: tl.tensor,
    value_row: tl.tensor,
    begin: tl.tensor,
    end: tl.tensor,
    anchor: tl.tensor,
    border: tl.tensor,
    inner: tl.tensor,
    outer: tl.tensor,
    best: tl.tensor,
    mass: tl.tensor,
    output: tl.tensor,
    KEYS: tl.constexpr,
    CHANNELS: tl.constexpr,
    PADDED: tl.constexpr,
    SOFTCAP: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Update the running softmax (base 2) of a tile of rows with the keys from ``begin`` to ``end``."""
    channel = tl.arange(0, PADDED)
    for start in range(begin, end, KEYS):
        key = start + tl.arange(0, KEYS)
        held = (key >= filler) & (key < end)  # filler may hold NaN, so it is not read
        there = held[:, None] & (channel < CHANNELS)[None, :]
        k = tl.load(keys + key.to(tl.int64)[:, None] * key_row + channel[None, :], mask=there, other=0.0)
        v = tl.load(values + key.to(tl.int64)[:, None] * value_row + channel[None, :], mask=there, other=0.0)
        scores = tl.dot(queries, tl.trans(k), input_precision="ieee") * inner
        if SOFTCAP:
            scores = (1.0 - 2.0 / (tl.exp(2.0 * scores) + 1.0)) * outer
        near = (key < anchor)[None, :] | (key[None, :] >= block_begin[:, None]) | (column >= border)[:, None]
        cell = near & (key[None, :] <= column[:, None]) & held[None, :]
        scores = tl.where(cell, scores, float("-inf"))
        higher = tl.maximum(best, tl.max(scores, 1))
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp2(scores - safe[:, None])
        shrink = tl.exp2(best - safe)
        mass = mass * shrink + tl.sum(weights, 1)
        output = output * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        best = higher
    return best, mass, output


@triton.jit
def _star_kernel(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    output: tl.tensor,
    lse: tl.tensor,
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
    block: tl.tensor,
    anchor: tl.tensor,
    whole: tl.tensor,
    inner: tl.tensor,
    outer: tl.tensor,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    CHANNELS: tl.constexpr,
    PADDED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    HAS_FILLER: tl.constexpr,
) -> None:
    """Compute one tile of rows. Grid: tiles of rows, query heads."""
    head = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    history = total - rows
    column = history + tl.minimum(row, rows - 1)
    first = history + tl.program_id(0) * ROWS
    end = tl.minimum(first + ROWS, total)
    border = total - whole
    begin = first // block * block
    apart = (begin > anchor) & (end <= border)  # otherwise all keys are read once
    anchor_end = tl.where(apart, anchor, 0)
    begin = tl.where(apart, begin, 0)
    filler = 0
    if HAS_FILLER:
        filler = tl.load(first_valid + head // group).to(tl.int32)
    channel = tl.arange(0, PADDED)
    there = inside[:, None] & (channel < CHANNELS)[None, :]
    queries = tl.load(q + head * q_head + row.to(tl.int64)[:, None] * q_row + channel[None, :], mask=there, other=0.0)
    keys, values = k + head // group * k_head, v + head // group * v_head
    block_begin = column // block * block
    best = tl.full([ROWS], float("-inf"), tl.float32)
    mass = tl.zeros([ROWS], tl.float32)
    found = tl.zeros([ROWS, PADDED], tl.float32)
    best, mass, found = _walk(
        queries, column, block_begin, filler, keys, values, k_row, v_row, 0, anchor_end, anchor, border,
        inner, outer, best, mass, found, KEYS, CHANNELS, PADDED, SOFTCAP,
    )  # fmt: skip
    best, mass, found = _walk(
        queries, column, block_begin, filler, keys, values, k_row, v_row, begin, end, anchor, border,
        inner, outer, best, mass, found, KEYS, CHANNELS, PADDED, SOFTCAP,
    )  # fmt: skip
    found = found / tl.where(mass == 0.0, 1.0, mass)[:, None]
    place = output + (head * rows + row)[:, None] * CHANNELS + channel[None, :]
    tl.store(place, found.to(output.dtype.element_ty), mask=there)
    ln_2 = 0.6931471805599453
    tl.store(lse + head * rows + row, (best + tl.log2(mass)) * ln_2, mask=inside)


def in_tiles(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    block: int,
    anchor: int,
    whole: int,
    *,
    scaling: float,
    softcap: float | None = None,
    first_valid: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the result of ``star_attention``. Keys and values need equally many channels."""
    queries, keys, values = (each if each.stride(2) == 1 else each.contiguous() for each in (queries, keys, values))
    heads, rows, channels = queries.shape
    output = torch.empty(heads, rows, channels, dtype=queries.dtype, device=queries.device)
    lse = torch.empty(heads, rows, dtype=torch.float32, device=queries.device)
    log2_e = 1.4426950408889634
    _star_kernel[(triton.cdiv(rows, _ROWS), heads)](
        queries,
        keys,
        values,
        output,
        lse,
        lse if first_valid is None else first_valid,
        queries.stride(0),
        queries.stride(1),
        keys.stride(0),
        keys.stride(1),
        values.stride(0),
        values.stride(1),
        rows,
        keys.shape[1],
        heads // keys.shape[0],
        block,
        anchor,
        min(whole, rows),
        scaling * log2_e if softcap is None else scaling / softcap,
        1.0 if softcap is None else softcap * log2_e,
        ROWS=_ROWS,
        KEYS=_KEYS,
        CHANNELS=channels,
        PADDED=max(16, triton.next_power_of_2(channels)),
        SOFTCAP=softcap is not None,
        HAS_FILLER=first_valid is not None,
    )
    return output, lse
