"""Build work lists on the device: which program computes which tiles, longest first, long rows split into parts.

All sizes follow from shapes and all counts stay on the device, so that building a list does not synchronise.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from loopserve.kernels.gpu.launch import processors

_PROGRAMS_PER_PROCESSOR = 2
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
