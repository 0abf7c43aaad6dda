"""Compute the bounds and codes of pages of keys: one program per page and block of channels reads the keys twice, the
second time from the cache.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from loopserve.kernels.gpu.launch import launch, padded, readable

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
