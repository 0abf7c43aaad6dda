"""Define line attention: masked attention under a mask of the cells of the lines."""

from __future__ import annotations

import torch
from torch import Tensor

from loopserve.kernels.masked import masked_attention, per_query_head, query_columns, visible


def line_mask(verticals: Tensor, slashes: Tensor, columns: Tensor) -> Tensor:
    """Return the cells of the lines that queries at ``columns`` ``[Tq]`` see: bool ``[Hq, Tq, Tk]``."""
    offsets = columns[:, None] - torch.arange(verticals.shape[1], device=verticals.device)
    return (verticals[:, None] | slashes[:, offsets.clamp(min=0)]) & (offsets >= 0)


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
    columns = query_columns(queries, keys)
    seen = per_query_head(visible(columns, keys.shape[1], first_valid=first_valid), queries.shape[0])
    mask = line_mask(verticals, slashes, columns) & seen
    return masked_attention(queries, keys, values, mask, scaling=scaling, softcap=softcap)
