"""Line attention tile by tile: each tile of rows gathers only the keys its lines touch, once, and masks inside them."""

from __future__ import annotations

import torch
from torch import Tensor

from loopserve.kernels.gathered import attend_gathered

_ROWS = 64  # an isolated slash touches as many keys as a tile has rows, so tiles are small


def vertical_slash(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    verticals: Tensor,
    slashes: Tensor,
    *,
    scaling: float,
    softcap: float | None,
    first_valid: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See the package."""
    rows, total = queries.shape[1], keys.shape[1]
    group = queries.shape[0] // keys.shape[0]
    output = torch.empty(queries.shape[0], rows, values.shape[2], dtype=queries.dtype, device=queries.device)
    lse = torch.empty(queries.shape[0], rows, dtype=torch.float32, device=queries.device)
    column = torch.arange(total, device=queries.device)
    counts = torch.nn.functional.pad(slashes.int().cumsum(1), (1, 0))  # slashes with an offset below x
    for start in range(0, rows, _ROWS):
        end = min(start + _ROWS, rows)
        low, high = total - rows + start, total - rows + end  # the tile's query columns
        seen = column[:high]
        touched = counts[:, high - seen] > counts[:, (low - seen).clamp(min=0)]
        touched |= verticals[:, :high]
        if first_valid is not None:
            touched &= seen >= first_valid.repeat_interleave(group)[:, None]
        for head in range(queries.shape[0]):
            needed = touched[head].nonzero().flatten()
            offsets = column[low:high, None] - needed
            mask = (verticals[head, needed] | slashes[head, offsets.clamp(min=0)]) & (offsets >= 0)
            part = queries[head, start:end], keys[head // group], values[head // group]
            output[head, start:end], lse[head, start:end] = attend_gathered(*part, needed, mask, scaling, softcap)
    return output, lse
