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


def slash_mass(probabilities: Tensor, columns: Tensor) -> Tensor:
    """Sums along the diagonals: the mass ``[Hq, n]`` at each offset of rows ``[Hq, r, n]`` standing at ``columns``."""
    slash = torch.zeros_like(probabilities[:, 0])
    for row, column in enumerate(columns.tolist()):
        slash[:, : column + 1] += probabilities[:, row, : column + 1].flip(-1)
    return slash
