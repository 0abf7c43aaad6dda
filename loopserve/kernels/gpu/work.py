"""Work lists made on the device: which program computes what, longest first, long rows cut into parts.

All sizes come from shapes alone and all counts stay on the device, so making a list never waits for it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from loopserve.kernels.gpu.launch import processors

_PROGRAMS_PER_PROCESSOR = 2
_LEAST_PART = 8  # tiles; below, starting and merging a part costs more than it spreads


@dataclass(frozen=True)
class WorkList:
    """items int32 ``[capacity, 4]``: tile of rows, first and end step, and the part to write or -1 to write the result.

    count int32 ``[1]``: items. first_part, part_count int32 ``[R]``: the parts of each tile of rows. parts: room for
    parts. programs: how many programs share the list.
    """

    items: Tensor
    count: Tensor
    first_part: Tensor
    part_count: Tensor
    parts: int
    programs: int


def work_list(steps: Tensor) -> WorkList:
    """A list for ``steps`` int32 ``[R]``, the tiles that each tile of rows has to compute.

    A part is at least what every program would get if work could be spread freely, so a row longer than that is cut
    and no list is longer than R plus the programs.
    """
    rows, device = len(steps), steps.device
    programs = _PROGRAMS_PER_PROCESSOR * processors(device)
    capacity = rows + programs
    fair = (steps.sum() + programs - 1).div(programs, rounding_mode="floor").clamp(min=_LEAST_PART)
    parts = (steps + fair - 1).div(fair, rounding_mode="floor").clamp(min=1)
    ends = parts.cumsum(0)
    # A row without steps stays in the list: its zeros must be written too.
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
