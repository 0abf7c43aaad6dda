"""Attention of one head's tile of rows over keys gathered for it; shared by the sparse operations' PyTorch paths."""

from __future__ import annotations

import torch
from torch import Tensor


def attend_gathered(
    queries: Tensor, keys: Tensor, values: Tensor, needed: Tensor, mask: Tensor, scaling: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """(output ``[T, D]``, log-sum-exp ``[T]``) of queries ``[T, D]`` over ``keys[needed]`` under a bool mask ``[T, len(needed)]``."""
    if len(needed) == 0:
        return values.new_zeros(queries.shape[0], values.shape[1]), queries.new_full(
            (queries.shape[0],), float("-inf")
        ).float()
    scores = (queries @ keys.index_select(0, needed).T).float().mul_(scaling)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores.masked_fill_(~mask, float("-inf"))
    lse = scores.logsumexp(-1)
    # A row without a cell has lse -inf; subtracting 0 instead keeps it at exp(-inf) = 0 rather than NaN.
    weights = scores.sub_(lse.masked_fill(lse.isinf(), 0.0)[:, None]).exp_()
    return weights.to(values.dtype) @ values.index_select(0, needed), lse
