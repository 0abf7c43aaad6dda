"""Compute coded logits on a GPU: one pass over the codes gives the logits of each block of columns, without storing
decoded keys.

A tile covers a few pages, or a part of one. Bounds are read once per page, codes are decoded in registers, and the rows
of a group are multiplied on matrix units. ``code_jumps`` stores only the largest logit per column, as an integer of the
same order.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from loopserve.kernels.gpu.launch import launch, padded, readable
from loopserve.kernels.gpu.limits import MOST_ROWS
from loopserve.kernels.gpu.top_columns import FORCED, best_columns, ordered
from loopserve.kernels.key_codes import KeyCodes, heavy_columns

__all__ = ["code_jumps", "code_logits", "code_threshold", "summarise_pages"]

_KEYS = 64  # columns of a tile
_BYTES = 64  # bytes of a code per step of a tile
_OBSERVED = 512  # columns per block of ``observe_kernel``


@triton.jit(do_not_specialize=["rows", "columns", "tail"])
def code_logits_kernel(
    q: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    codes: tl.tensor,
    logits: tl.tensor,
    numbers: tl.tensor,
    sums: tl.tensor,
    bounds_head: tl.tensor,
    codes_head: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    tail: tl.tensor,
    scaling: tl.tensor,
    ROWS: tl.constexpr,
    PAGES: tl.constexpr,
    PAGE: tl.constexpr,
    PAGE_ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    BITS: tl.constexpr,
    WIDTH: tl.constexpr,
    WRITES: tl.constexpr,
    RANKS: tl.constexpr,
    SUMS: tl.constexpr,
) -> None:
    """Compute logits of one block of columns. Grid: blocks of PAGES times PAGE_ROWS columns, KV heads, tiles of rows.

    WRITES: store logits ``[Hkv, rows, columns]``. RANKS: store the largest over all rows, which form one tile, as
    ordered integers ``[Hkv, tail]``. SUMS: store log-sum-exps per block, ``[Hkv, rows, blocks]``.
    """
    head = tl.program_id(1).to(tl.int64)
    row = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    PARTS: tl.constexpr = 8 // BITS
    BYTES: tl.constexpr = CHANNELS // PARTS
    KEYS: tl.constexpr = PAGES * PAGE_ROWS
    CUTS: tl.constexpr = (PAGE + PAGE_ROWS - 1) // PAGE_ROWS  # tiles per page, where a page is longer than a tile
    unit = tl.program_id(0) * PAGES + tl.arange(0, PAGES)
    page = (unit // CUTS).to(tl.int64)
    there = page * PAGE < columns
    key = (unit % CUTS * PAGE_ROWS)[:, None] + tl.arange(0, PAGE_ROWS)[None, :]
    column = page[:, None] * PAGE + key
    held = (key < PAGE) & (column < columns)
    codes_at = codes + head * codes_head + column * BYTES
    bounds_at = head * bounds_head + page * CHANNELS
    scores = tl.zeros([ROWS, KEYS], tl.float32)
    for start in tl.static_range(0, BYTES, WIDTH):
        byte = start + tl.arange(0, WIDTH)
        used = byte < BYTES
        packed = tl.load(
            codes_at[:, :, None] + byte[None, None, :], mask=held[:, :, None] & used[None, None, :], other=0
        )
        for part in tl.static_range(PARTS):
            channel = part * BYTES + byte
            known = there[:, None] & used[None, :]
            lowest = tl.load(low + bounds_at[:, None] + channel[None, :], mask=known, other=0.0).to(tl.float32)
            highest = tl.load(high + bounds_at[:, None] + channel[None, :], mask=known, other=0.0).to(tl.float32)
            step = (highest - lowest) * (1.0 / ((1 << BITS) - 1))
            code = ((packed >> (part * BITS)) & ((1 << BITS) - 1)).to(tl.float32)
            keys = tl.reshape(lowest[:, None, :] + code * step[:, None, :], [KEYS, WIDTH])
            places = q + (head * rows + row)[:, None] * CHANNELS + channel[None, :]
            q_part = tl.load(places, mask=inside[:, None] & used[None, :], other=0.0)
            scores = tl.dot(q_part, tl.trans(keys), scores, input_precision="tf32x3")

    # The same columns again, in the layout of the scores.
    index = tl.arange(0, KEYS)
    unit = tl.program_id(0) * PAGES + index // PAGE_ROWS
    key = unit % CUTS * PAGE_ROWS + index % PAGE_ROWS
    column = (unit // CUTS).to(tl.int64) * PAGE + key
    held = (key < PAGE) & (column < columns)
    seen = inside[:, None] & held[None, :]
    scores *= scaling
    if WRITES:
        tl.store(logits + (head * rows + row)[:, None] * columns + column[None, :], scores, mask=seen)
    if RANKS:
        best = ordered(tl.max(tl.where(inside[:, None], scores, float("-inf")), 0))
        tl.store(numbers + head * tail + column, best, mask=held & (column < tail))
    if SUMS:
        scores = tl.where(seen, scores, float("-inf"))
        peak = tl.max(scores, 1)
        base = tl.where(peak == float("-inf"), 0.0, peak)
        total = tl.sum(tl.exp(scores - base[:, None]), 1)
        place = (head * rows + row) * tl.num_programs(0) + tl.program_id(0)
        empty = total == 0.0
        found = tl.where(empty, float("-inf"), base + tl.log(tl.where(empty, 1.0, total)))
        tl.store(sums + place, found, mask=inside)


@triton.jit(do_not_specialize=["rows", "columns", "tail"])
def observe_kernel(
    logits: tl.tensor,
    lse: tl.tensor,
    observed: tl.tensor,
    observed_head: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    tail: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """Add the mean softmax of the rows. Grid: blocks of columns, KV heads."""
    head = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = column < tail
    weights = tl.zeros([BLOCK], tl.float32)
    for row in range(rows):
        logit = tl.load(logits + (head * rows + row) * columns + column, mask=inside, other=float("-inf"))
        weights += tl.exp(logit - tl.load(lse + head * rows + row))
    place = observed + head * observed_head + column
    tl.store(place, tl.load(place, mask=inside, other=0.0) + weights / rows, mask=inside)


class _Found(NamedTuple):
    """Hold the requested results of ``_pass``; the others are None. See ``code_logits_kernel``."""

    logits: Tensor
    numbers: Tensor
    sums: Tensor


def _pass(queries: Tensor, of: KeyCodes, scaling: float, *, tail: int, writes: bool, ranks: bool, sums: bool) -> _Found:
    """Read all codes once and compute what is requested."""
    heads, _, channels = of.low.shape
    page = of.codes.shape[2]
    held = queries.float().contiguous()  # few numbers, and multiplied with bounds of this dtype
    rows = queries.shape[0] // heads * queries.shape[1]
    tile_rows = min(MOST_ROWS, padded(rows))
    page_rows = min(_KEYS, triton.next_power_of_2(page))
    tile_pages = _KEYS // page_rows
    blocks = -(-(-(-of.columns // page) * -(-page // page_rows)) // tile_pages)
    logits = torch.empty(heads, rows, of.columns if writes else 0, dtype=torch.float32, device=queries.device)
    numbers = torch.empty(heads, tail if ranks else 0, dtype=torch.int32, device=queries.device)
    found = _Found(
        logits, numbers, torch.empty(heads, rows, blocks if sums else 0, dtype=torch.float32, device=queries.device)
    )
    launch(
        code_logits_kernel,
        (blocks, heads, -(-rows // tile_rows)),
        held,
        of.low,
        of.high,
        of.codes,
        *found,
        of.low.stride(0),
        of.codes.stride(0),
        rows,
        of.columns,
        tail,
        scaling,
        ROWS=tile_rows,
        PAGES=tile_pages,
        PAGE=page,
        PAGE_ROWS=page_rows,
        CHANNELS=channels,
        BITS=of.bits,
        WIDTH=min(_BYTES, padded(of.codes.shape[3])),
        WRITES=writes,
        RANKS=ranks,
        SUMS=sums,
        num_warps=4,
    )
    return found


def code_logits(queries: Tensor, of: KeyCodes, *, scaling: float) -> Tensor:
    """See the operation."""
    return _pass(queries, of, scaling, tail=0, writes=True, ranks=False, sums=False).logits


def code_jumps(
    queries: Tensor, of: KeyCodes, base: Tensor, tail: int, budget: int, *, scaling: float, observed: Tensor | None
) -> Tensor:
    """See the operation."""
    if tail == 0:
        return torch.empty_like(base)
    watched = observed is not None
    found = _pass(queries, of, scaling, tail=tail, writes=watched, ranks=True, sums=watched)
    if observed is not None:
        heads, rows, columns = found.logits.shape
        launch(
            observe_kernel,
            (-(-tail // _OBSERVED), heads),
            found.logits,
            found.sums.logsumexp(-1),
            observed,
            observed.stride(0),
            rows,
            columns,
            tail,
            BLOCK=_OBSERVED,
            num_warps=4,
        )
    # The base is ranked above all others, so that one selection returns base and best others in order.
    numbers = found.numbers.scatter_(1, base, FORCED)
    return best_columns(numbers, base.shape[1] + budget)


def code_threshold(
    queries: Tensor, of: KeyCodes, base: Tensor, tail: int, threshold: float, least: int, most: int, **options: Any
) -> tuple[Tensor, Tensor]:
    """See the operation. The codes are read by a kernel; how many columns the longest head has is waited for."""
    logits = code_logits(queries, of, scaling=options.pop("scaling"))
    return heavy_columns(logits, base, tail, threshold, least, most, **options)


_CHANNELS = 128  # bytes of a key that a program summarises
_ROWS = 32  # keys of a page per step


@triton.jit(do_not_specialize=["first", "total"])
def summarise_pages_kernel(
    k: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    codes: tl.tensor,
    k_head: tl.tensor,
    k_row: tl.tensor,
    bounds_head: tl.tensor,
    codes_head: tl.tensor,
    first: tl.tensor,
    total: tl.tensor,
    PAGE: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    PARTS: tl.constexpr,
    BITS: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    """Summarise one page.

    Grid: pages from ``first`` on, blocks of WIDTH bytes, KV heads. A byte holds PARTS channels; BITS 0: bounds only.
    """
    page = first.to(tl.int64) + tl.program_id(0)
    head = tl.program_id(2).to(tl.int64)
    BYTES: tl.constexpr = CHANNELS // PARTS
    byte = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    part = tl.arange(0, PARTS)
    channel = part[:, None] * BYTES + byte[None, :]
    used = (part >= 0)[:, None] & (byte < BYTES)[None, :]
    count = tl.minimum(total - page * PAGE, PAGE).to(tl.int32)
    k_page = k + head * k_head + page * PAGE * k_row
    smallest = tl.full([PARTS, WIDTH], float("inf"), tl.float32)
    largest = tl.full([PARTS, WIDTH], float("-inf"), tl.float32)
    for start in range(0, count, ROWS):
        row = start + tl.arange(0, ROWS)
        held = (row < count)[:, None, None] & used[None, :, :]
        places = k_page + row.to(tl.int64)[:, None, None] * k_row + channel[None, :, :]
        key = tl.load(places, mask=held, other=0.0).to(tl.float32)
        smallest = tl.minimum(smallest, tl.min(tl.where(held, key, float("inf")), 0))
        largest = tl.maximum(largest, tl.max(tl.where(held, key, float("-inf")), 0))
    bounds_at = head * bounds_head + page * CHANNELS + channel
    tl.store(low + bounds_at, smallest.to(low.dtype.element_ty), mask=used)
    tl.store(high + bounds_at, largest.to(high.dtype.element_ty), mask=used)
    if BITS > 0:
        most = (1 << BITS) - 1.0
        # Divides as the reference does: other rounding would give the neighbouring code, half a step off.
        step = tl.maximum(
            tl.div_rn(largest - smallest, tl.full([PARTS, WIDTH], most, tl.float32)), 1.1754943508222875e-38
        )
        step = tl.where(used, step, 1.0)
        smallest = tl.where(used, smallest, 0.0)
        for start in range(0, count, ROWS):
            row = start + tl.arange(0, ROWS)
            held = (row < count)[:, None, None] & used[None, :, :]
            places = k_page + row.to(tl.int64)[:, None, None] * k_row + channel[None, :, :]
            key = tl.load(places, mask=held, other=0.0).to(tl.float32)
            exact = tl.div_rn(key - smallest[None, :, :], tl.broadcast_to(step[None, :, :], [ROWS, PARTS, WIDTH]))
            exact = tl.minimum(tl.maximum(exact, 0.0), most)
            # Adding 1.5 * 2^23 rounds a float to an integer in its lowest bits.
            code = (exact + 12582912.0).to(tl.int32, bitcast=True) & 0xFF
            packed = tl.sum(code << (part * BITS)[None, :, None], 1).to(tl.uint8)
            held = (row < count)[:, None] & (byte < BYTES)[None, :]
            places = codes + head * codes_head + (page * PAGE + row)[:, None] * BYTES + byte[None, :]
            tl.store(places, packed, mask=held)


def summarise_pages(
    keys: Tensor, page: int, first: int, low: Tensor, high: Tensor, codes: Tensor | None, bits: int
) -> None:
    """See ``key_codes``. The pages of the buffers must be contiguous."""
    keys = readable(keys)
    heads, total, channels = keys.shape
    pages = -(-total // page) - first
    if pages < 1:
        return
    parts = 1 if codes is None else 8 // bits
    width = min(_CHANNELS // parts, padded(channels // parts))
    launch(
        summarise_pages_kernel,
        (pages, -(-channels // (parts * width)), heads),
        keys,
        low,
        high,
        low if codes is None else codes,
        keys.stride(0),
        keys.stride(1),
        low.stride(0),
        0 if codes is None else codes.stride(0),
        first,
        total,
        PAGE=page,
        ROWS=min(_ROWS, triton.next_power_of_2(page)),
        CHANNELS=channels,
        PARTS=parts,
        BITS=0 if codes is None else bits,
        WIDTH=width,
        num_warps=4,
    )
