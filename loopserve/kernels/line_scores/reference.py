"""Line masses by definition: softmax rows, then sums along columns and along diagonals."""

from __future__ import annotations

import torch
from torch import Tensor

from loopserve.kernels.shapes import scores, visible


def probabilities(
    queries: Tensor, keys: Tensor, columns: Tensor, *, scaling: float, softcap: float | None, first_valid: Tensor | None
) -> Tensor:
    """Softmax over the visible keys ``[Hq, r, n]``; a row that sees none is zero."""
    mask = visible(columns, keys.shape[1], first_valid=first_valid)
    if mask.dim() == 3:
        mask = mask[:, None]
    found = scores(queries, keys, scaling=scaling, softcap=softcap).masked_fill(~mask, float("-inf"))
    return found.softmax(-1).nan_to_num(0.0).flatten(0, 1)


def line_scores(
    queries: Tensor, keys: Tensor, columns: Tensor, *, scaling: float, softcap: float | None, first_valid: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """See the package."""
    rows = probabilities(queries, keys, columns, scaling=scaling, softcap=softcap, first_valid=first_valid)
    total = keys.shape[1]
    offsets = columns[:, None] - torch.arange(total, device=keys.device)
    slash = torch.zeros_like(rows[:, 0])
    for row, offset in zip(rows.unbind(1), offsets, strict=True):
        seen = offset >= 0
        slash[:, offset[seen]] += row[:, seen]
    return rows, rows.sum(1), slash
