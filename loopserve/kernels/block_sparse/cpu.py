"""Block attention tile by tile: each query tile gathers its key tiles."""

from __future__ import annotations

import torch
from torch import Tensor

from loopserve.kernels.gathered import attend_gathered


def block_sparse(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    blocks: Tensor,
    *,
    tile: int,
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
    for number in range(blocks.shape[1]):
        start, end = number * tile, min((number + 1) * tile, rows)
        low, high = total - rows + start, total - rows + end
        for head in range(queries.shape[0]):
            touched = blocks[head, number].repeat_interleave(tile)[:high]
            if first_valid is not None:
                touched = touched & (column[: len(touched)] >= first_valid[head // group])
            needed = touched.nonzero().flatten()
            mask = needed <= column[low:high, None]
            part = queries[head, start:end], keys[head // group], values[head // group]
            output[head, start:end], lse[head, start:end] = attend_gathered(*part, needed, mask, scaling, softcap)
    return output, lse
