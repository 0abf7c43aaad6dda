"""Build work lists on the device: which program computes which tiles, longest first, long rows split into parts.

All sizes follow from shapes and all counts stay on the device, so that building a list does not synchronise.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from loopserve.kernels.gpu.launch import launch, processors

_PROGRAMS_PER_PROCESSOR = 2
_BLOCK = 2048  # flags per program of ``compact_kernel``
WORD_PADDING = 256  # unset flags before and after those of a head, so that a window may begin or end outside
_LEAST_PART = 8  # tiles; a smaller part costs more to start and merge than it saves


@dataclass(frozen=True)
class WorkList:
    """Hold the items int32 ``[capacity, 4]``: tile of rows, first and end step, and the part to write or -1 for the
    result.

    count int32 ``[1]``: number of items. first_part, part_count int32 ``[R]``: the parts of each tile of rows. parts:
    capacity for parts. programs: number of programs that share the list.
    """

    items: Tensor
    count: Tensor
    first_part: Tensor
    part_count: Tensor
    parts: int
    programs: int


@triton.jit
def load_item(items: tl.tensor, item: tl.tensor) -> tl.tensor:
    """Return tile of rows, first and end step, and the part to write or -1 for the result."""
    entry = items + item * 4
    return tl.load(entry), tl.load(entry + 1), tl.load(entry + 2), tl.load(entry + 3)


def work_list(steps: Tensor) -> WorkList:
    """Build a list for ``steps`` int32 ``[R]``, the number of tiles that each tile of rows computes.

    A part has at least the even share of a program. So only rows above that share are split, and the list has at most R
    plus ``programs`` items.
    """
    rows, device = len(steps), steps.device
    programs = _PROGRAMS_PER_PROCESSOR * processors(device)
    capacity = rows + programs
    fair = (steps.sum() + programs - 1).div(programs, rounding_mode="floor").clamp(min=_LEAST_PART)
    parts = (steps + fair - 1).div(fair, rounding_mode="floor").clamp(min=1)
    ends = parts.cumsum(0)
    # A row without steps stays in the list, since its zeros must be written.
    number = torch.arange(capacity, device=device)
    row = torch.searchsorted(ends, number, right=True).clamp(max=rows - 1)
    size = (steps + parts - 1).div(parts, rounding_mode="floor")[row]
    which = number - (ends - parts)[row]
    begin = which * size
    end = torch.minimum(begin + size, steps[row])
    cut = parts.masked_fill(parts <= 1, 0)
    first_part = cut.cumsum(0) - cut
    part = (first_part[row] + which).masked_fill(parts[row] <= 1, -1)
    length = (end - begin).masked_fill(number >= ends[-1:], -1)
    items = torch.stack([row, begin, end, part], dim=1)[length.argsort(descending=True)]
    return WorkList(
        items=items.int(),
        count=ends[-1:].int(),
        first_part=first_part.int(),
        part_count=parts.int(),
        # A row of w steps is cut into fewer than w / fair + 1 parts, and only where w > fair: at most twice w / fair.
        parts=2 * programs,
        programs=min(programs, capacity),
    )


@triton.jit(do_not_specialize=["total", "word_count"])
def words_kernel(
    flags: tl.tensor,
    words: tl.tensor,
    total: tl.tensor,
    word_count: tl.tensor,
    PADDING: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Pack flags bool ``[H, n]`` into overlapping words. Grid: blocks of words, heads."""
    head = tl.program_id(1)
    word = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    bit = tl.arange(0, 64)
    place = word[:, None] * 32 + bit[None, :] - PADDING
    inside = (place >= 0) & (place < total)
    flag = tl.load(flags + head.to(tl.int64) * total + place, mask=inside, other=0).to(tl.int64)
    tl.store(
        words + head.to(tl.int64) * word_count + word,
        tl.sum(flag << bit.to(tl.int64)[None, :], 1),
        mask=word < word_count,
    )


def flag_words(flags: Tensor) -> Tensor:
    """Return flags bool ``[H, n]`` as int64 ``[H, W]``: word w holds 64 flags from ``32 * w - WORD_PADDING`` on."""
    flags = flags.contiguous()
    heads, total = flags.shape
    count = (total + 2 * WORD_PADDING) // 32
    words = torch.empty(heads, count, dtype=torch.int64, device=flags.device)
    launch(
        words_kernel,
        (-(-count // 32), heads),
        flags.view(torch.uint8),
        words,
        total,
        count,
        PADDING=WORD_PADDING,
        BLOCK=32,
        num_warps=4,
    )
    return words


@triton.jit
def window(words: tl.tensor, start: tl.tensor, PADDING: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """Return the 64 flags from ``start`` on (one position or a vector) as two int32."""
    place = start + PADDING
    shift = (place & 31).to(tl.int64)
    low = (tl.load(words + (place >> 5)) >> shift).to(tl.int32)
    high = (tl.load(words + (place >> 5) + 1) >> shift).to(tl.int32)
    return low, high


@triton.jit(do_not_specialize=["length", "stride"])
def compact_kernel(
    flags: tl.tensor, starts: tl.tensor, indices: tl.tensor, length: tl.tensor, stride: tl.tensor, BLOCK: tl.constexpr
) -> None:
    """Write the indices of the set flags of one row, from ``starts`` on. Grid: rows."""
    row = tl.program_id(0)
    place = tl.load(starts + row)
    for begin in range(0, length, BLOCK):
        index = begin + tl.arange(0, BLOCK)
        flag = tl.load(flags + row.to(tl.int64) * stride + index, mask=index < length, other=0).to(tl.int32)
        upto = tl.cumsum(flag, 0)
        tl.store(indices + place + upto - flag, index, mask=flag != 0)
        place += tl.sum(flag, 0)


def compacted(flags: Tensor, starts: Tensor, indices: Tensor) -> Tensor:
    """Fill ``indices`` int32 with the ascending indices of the set flags bool ``[R, n]``, row r from ``starts[r]``
    (int64) on.
    """
    block = min(_BLOCK, max(16, 1 << (flags.shape[1] - 1).bit_length()))
    launch(
        compact_kernel,
        (flags.shape[0],),
        flags.view(torch.uint8),
        starts,
        indices,
        flags.shape[1],
        flags.stride(0),
        BLOCK=block,
        num_warps=4,
    )
    return indices


def compacted_rows(flags: Tensor, capacity: int, filler: int) -> Tensor:
    """Return the indices of the set flags as a table int32 ``[R, capacity]``, padded with ``filler``.

    No row may have more than ``capacity`` set flags.
    """
    indices = torch.full((flags.shape[0], capacity), filler, dtype=torch.int32, device=flags.device)
    starts = torch.arange(flags.shape[0], device=flags.device) * capacity
    return compacted(flags, starts, indices)
