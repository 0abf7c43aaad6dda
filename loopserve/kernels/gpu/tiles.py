"""Compute steps of attention over one tile; inlined into the kernels. Scores and log-sum-exps are base 2 inside."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from loopserve.kernels.gpu.launch import launch, padded


@triton.jit
def offsets(
    rows: tl.tensor, stride: tl.tensor, inside: tl.tensor, table: tl.tensor, block_stride: tl.tensor, SIZE: tl.constexpr
) -> tl.tensor:
    """Return how far from row 0 of block 0 rows lie, 64-bit.

    SIZE: rows of a block, a power of two; block i of the rows is block ``table[i]`` of the store. 0: the store is one
    block. Rows that are not inside read no table, and give any number.
    """
    if SIZE:
        block = tl.load(table + rows // SIZE, mask=inside, other=0)
        found = block * block_stride + (rows % SIZE).to(tl.int64) * stride
    else:
        found = rows.to(tl.int64) * stride
    return found


@triton.jit
def load_rows(
    base: tl.tensor,
    rows: tl.tensor,
    stride: tl.tensor,
    inside: tl.tensor,
    CHANNELS: tl.constexpr,
    PADDED: tl.constexpr,
    table: tl.tensor = None,
    block_stride: tl.tensor = None,
    SIZE: tl.constexpr = 0,
) -> tl.tensor:
    """Load rows of a matrix as ``[len(rows), PADDED]``; rows that are not inside give 0 and are not read.

    table, block_stride, SIZE: of a store in blocks; see ``offsets``.
    """
    channel = tl.arange(0, PADDED)
    places = base + offsets(rows, stride, inside, table, block_stride, SIZE)[:, None] + channel[None, :]
    mask = inside[:, None]
    if CHANNELS != PADDED:
        mask = mask & (channel < CHANNELS)[None, :]
    return tl.load(places, mask=mask, other=0.0)


@triton.jit
def store_rows(
    base: tl.tensor,
    rows: tl.tensor,
    stride: tl.tensor,
    inside: tl.tensor,
    tile: tl.tensor,
    CHANNELS: tl.constexpr,
    PADDED: tl.constexpr,
) -> None:
    """Store rows of a tile; the reverse of ``load_rows``."""
    channel = tl.arange(0, PADDED)
    places = base + rows.to(tl.int64)[:, None] * stride + channel[None, :]
    mask = inside[:, None]
    if CHANNELS != PADDED:
        mask = mask & (channel < CHANNELS)[None, :]
    tl.store(places, tile.to(base.dtype.element_ty), mask=mask)


@triton.jit
def scored(
    q: tl.tensor, k: tl.tensor, inner: tl.tensor, outer: tl.tensor, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr
) -> tl.tensor:
    """Return scores float32 ``[R, K]`` of rows ``[R, D]`` and keys ``[K, D]``."""
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * inner
    if SOFTCAP:
        scores = outer * (
            1.0 - 2.0 / (tl.exp(2.0 * scores) + 1.0)
        )  # tanh in a form that saturates instead of overflowing
    return scores


@triton.jit
def empty_softmax(ROWS: tl.constexpr, CHANNELS: tl.constexpr) -> tl.tensor:
    """Return a running softmax that has seen no key: sums ``[ROWS, CHANNELS]`` and ``[ROWS]``, maxima ``[ROWS]``."""
    acc = tl.zeros([ROWS, CHANNELS], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    return acc, total, peak


@triton.jit
def taken_in(
    acc: tl.tensor, total: tl.tensor, peak: tl.tensor, scores: tl.tensor, v: tl.tensor, PRECISION: tl.constexpr
) -> tl.tensor:
    """Update the running softmax with one tile of scores (-inf where masked): sums ``[R, D]``, ``[R]``, maxima ``[R]``."""
    higher = tl.maximum(peak, tl.max(scores, 1))
    base = tl.where(higher == float("-inf"), 0.0, higher)  # a row that has seen no key yet: -inf - -inf is NaN
    weights = tl.exp2(scores - base[:, None])
    shrink = tl.exp2(peak - base)
    acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
    return acc, total * shrink + tl.sum(weights, 1), higher


@triton.jit
def finished(acc: tl.tensor, total: tl.tensor, peak: tl.tensor) -> tl.tensor:
    """Return output and natural log-sum-exp of a running softmax; an empty row gets 0 and -inf."""
    empty = total == 0.0
    divisor = tl.where(empty, 1.0, total)
    lse = tl.where(empty, float("-inf"), (peak + tl.log2(divisor)) * 0.6931471805599453)
    return acc / divisor[:, None], lse


@triton.jit
def spans(
    acc: tl.tensor,
    total: tl.tensor,
    peak: tl.tensor,
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    k_stride: tl.tensor,
    v_stride: tl.tensor,
    begin: tl.tensor,
    end: tl.tensor,
    oldest: tl.tensor,
    newest: tl.tensor,
    inner: tl.tensor,
    outer: tl.tensor,
    KEYS: tl.constexpr,
    CHANNELS: tl.constexpr,
    PADDED: tl.constexpr,
    VALUE_CHANNELS: tl.constexpr,
    VALUE_PADDED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
    MASKED: tl.constexpr,
    table: tl.tensor = None,
    k_block: tl.tensor = None,
    v_block: tl.tensor = None,
    SIZE: tl.constexpr = 0,
) -> tl.tensor:
    """Update the running softmax with the keys ``[begin, end)``, tile by tile.

    k, v: addresses of key 0, of block 0 with a block table (see ``offsets``). MASKED: row i sees only the keys
    ``oldest[i]`` to ``newest[i]``. Otherwise every row sees all of them, and their number is a multiple of KEYS.
    """
    for key0 in range(begin, end, KEYS):
        keys = key0 + tl.arange(0, KEYS)
        inside = keys < end
        k_tile = load_rows(k, keys, k_stride, inside, CHANNELS, PADDED, table, k_block, SIZE)
        v_tile = load_rows(v, keys, v_stride, inside, VALUE_CHANNELS, VALUE_PADDED, table, v_block, SIZE)
        scores = scored(q, k_tile, inner, outer, SOFTCAP, PRECISION)
        if MASKED:
            seen = inside[None, :] & (keys[None, :] >= oldest[:, None]) & (keys[None, :] <= newest[:, None])
            scores = tl.where(seen, scores, float("-inf"))
        acc, total, peak = taken_in(acc, total, peak, scores, v_tile, PRECISION)
    return acc, total, peak


@triton.jit
def store_item(
    output: tl.tensor,
    lse: tl.tensor,
    part_output: tl.tensor,
    part_lse: tl.tensor,
    acc: tl.tensor,
    total: tl.tensor,
    peak: tl.tensor,
    head: tl.tensor,
    start: tl.tensor,
    rows: tl.tensor,
    part: tl.tensor,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    PADDED: tl.constexpr,
) -> None:
    """Store the running softmax of an item of a work list: as the rows from ``start`` on of a head, or as a part.

    part: number of the part, or -1 for the result.
    """
    found, found_lse = finished(acc, total, peak)
    row = tl.arange(0, ROWS)
    inside = start + row < rows
    if part < 0:
        first = head * rows
        store_rows(output + first * CHANNELS, start + row, CHANNELS, inside, found, CHANNELS, PADDED)
        tl.store(lse + first + start + row, found_lse, mask=inside)
    else:
        place = part.to(tl.int64) * ROWS
        store_rows(part_output + place * CHANNELS, row, CHANNELS, row >= 0, found, CHANNELS, PADDED)
        tl.store(part_lse + place + row, found_lse)


@triton.jit(do_not_specialize=["rows", "tiles"])
def merge_kernel(
    part_output: tl.tensor,
    part_lse: tl.tensor,
    output: tl.tensor,
    lse: tl.tensor,
    first_part: tl.tensor,
    part_count: tl.tensor,
    rows: tl.tensor,
    tiles: tl.tensor,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    PADDED: tl.constexpr,
    PARTS: tl.constexpr,
) -> None:
    """Merge the parts of one tile of rows.

    PARTS: the number of parts of every tile, in order; 0: the count is loaded, and 1 means already written.
    """
    tile = tl.program_id(0)
    head = tile // tiles
    row = tile % tiles * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    if PARTS == 0:
        first, count = tl.load(first_part + tile), tl.load(part_count + tile)
    else:
        first, count = tile * PARTS, PARTS
    if count > 1:
        within = tl.arange(0, ROWS)
        peak = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        acc = tl.zeros([ROWS, PADDED], tl.float32)
        for part in range(count):
            place = (first + part).to(tl.int64) * ROWS
            found = tl.load(part_lse + place + within)
            higher = tl.maximum(peak, found)
            base = tl.where(higher == float("-inf"), 0.0, higher)
            shrink, weight = tl.exp(peak - base), tl.exp(found - base)
            piece = load_rows(part_output + place * CHANNELS, within, CHANNELS, within >= 0, CHANNELS, PADDED)
            acc = acc * shrink[:, None] + piece * weight[:, None]
            total = total * shrink + weight
            peak = higher
        empty = total == 0.0
        divisor = tl.where(empty, 1.0, total)
        start = head.to(tl.int64) * rows
        store_rows(output + start * CHANNELS, row, CHANNELS, inside, acc / divisor[:, None], CHANNELS, PADDED)
        tl.store(lse + start + row, tl.where(empty, float("-inf"), peak + tl.log(divisor)), mask=inside)


def empty_result(
    heads: int, rows: int, channels: int, *, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return an output ``[heads, rows, channels]`` and a log-sum-exp float32 ``[heads, rows]`` for a kernel to write."""
    output = torch.empty(heads, rows, channels, dtype=dtype, device=device)
    return output, torch.empty(heads, rows, dtype=torch.float32, device=device)


def merge_parts(
    part_output: Tensor,
    part_lse: Tensor,
    output: Tensor,
    lse: Tensor,
    *,
    tile_rows: int,
    first_part: Tensor | None = None,
    part_count: Tensor | None = None,
    parts: int = 0,
) -> None:
    """Write rows ``[H, T, D]`` and ``[H, T]`` (dense) from float32 parts ``[P, tile_rows, D]`` and ``[P, tile_rows]``.

    A tile of rows has ``parts`` consecutive parts, or those that ``first_part`` and ``part_count`` int32 ``[H *
    tiles]`` give. Tiles with one part were written by the kernel that computed it.
    """
    heads, rows, channels = output.shape
    tiles = -(-rows // tile_rows)
    unused = part_lse  # a valid pointer where nothing is read
    launch(
        merge_kernel,
        (heads * tiles,),
        part_output,
        part_lse,
        output,
        lse,
        unused if first_part is None else first_part,
        unused if part_count is None else part_count,
        rows,
        tiles,
        ROWS=tile_rows,
        CHANNELS=channels,
        PADDED=padded(channels),
        PARTS=parts,
        num_warps=4,
    )
