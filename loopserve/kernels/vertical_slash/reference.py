"""Line attention by definition: a mask with the cells of the lines, then masked attention."""

from __future__ import annotations

import torch
from torch import Tensor

from loopserve.kernels.dense_attention.reference import masked_attention
from loopserve.kernels.shapes import query_columns, visible


def line_mask(verticals: Tensor, slashes: Tensor, columns: Tensor) -> Tensor:
    """Cells of the lines at or before each query: bool ``[Hq, Tq, Tk]``."""
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
    columns = query_columns(queries, keys, None)
    mask = line_mask(verticals, slashes, columns).unflatten(0, (keys.shape[0], -1))
    if first_valid is not None:
        mask = mask & visible(columns, keys.shape[1], first_valid=first_valid)[:, None]
    return masked_attention(queries, keys, values, mask, scaling=scaling, softcap=softcap)
