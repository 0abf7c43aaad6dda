"""Compute attention under an explicit mask, as the reference implementations need it."""

from __future__ import annotations

import torch
from torch import Tensor


def query_columns(queries: Tensor, keys: Tensor, columns: Tensor | None = None) -> Tensor:
    """Return the columns of the queries: the given ones ``[Tq]``, or the last Tq."""
    if columns is not None:
        return columns
    return torch.arange(keys.shape[1] - queries.shape[1], keys.shape[1], device=keys.device)


def visible(columns: Tensor, total: int, *, window: int | None = None, first_valid: Tensor | None = None) -> Tensor:
    """Return which keys the queries at ``columns`` see: bool ``[1, Tq, Tk]``, or ``[Hkv, Tq, Tk]`` with
    ``first_valid``.

    window: a query sees its own column and the window - 1 before it. first_valid ``[Hkv]``: columns before it are
    filler.
    """
    key = torch.arange(total, device=columns.device)
    seen = (key <= columns[:, None])[None]
    if window is not None:
        seen = seen & (key > columns[:, None] - window)
    if first_valid is not None:
        seen = seen & (key >= first_valid[:, None, None])
    return seen


def per_query_head(mask: Tensor, heads: int) -> Tensor:
    """Repeat a mask of KV heads ``[Hkv or 1, Tq, Tk]`` for query heads: ``[Hq or 1, Tq, Tk]``."""
    return mask if mask.shape[0] == 1 else mask.repeat_interleave(heads // mask.shape[0], dim=0)


def scaled_scores(queries: Tensor, keys: Tensor, *, scaling: float, softcap: float | None) -> Tensor:
    """Return scores ``[Hq, Tq, Tk]`` in float32 (float64 stays float64), without repeating the keys of a group."""
    kind = torch.promote_types(queries.dtype, torch.float32)
    rows = queries.to(kind).reshape(keys.shape[0], -1, queries.shape[2])  # the heads of a group as rows of one product
    scores = (rows @ keys.to(kind).transpose(1, 2)).view(*queries.shape[:2], keys.shape[1]) * scaling
    return softcap * torch.tanh(scores / softcap) if softcap else scores


def masked_softmax(scores: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return probabilities ``[Hq, Tq, Tk]`` and log-sum-exp ``[Hq, Tq]``; a row without a visible cell gets 0 and -inf."""
    scores = scores.masked_fill(~mask, float("-inf"))
    lse = scores.logsumexp(-1)
    finite = lse.masked_fill(lse == float("-inf"), 0.0)  # -inf minus -inf would be NaN
    return (scores - finite[..., None]).exp(), lse


def masked_attention(
    queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor, *, scaling: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """Return output ``[Hq, Tq, Dv]`` and log-sum-exp float32 ``[Hq, Tq]`` under a bool mask ``[Hq or 1, Tq, Tk]``."""
    probabilities, lse = masked_softmax(scaled_scores(queries, keys, scaling=scaling, softcap=softcap), mask)
    # Filler columns may hold NaN, and 0 * NaN is NaN. So values that no row of a KV head attends to are set to 0.
    used = mask.any(1).expand(queries.shape[0], -1).reshape(keys.shape[0], -1, keys.shape[1]).any(1)
    clean = values.to(probabilities.dtype).masked_fill(~used[..., None], 0.0)
    rows = probabilities.view(keys.shape[0], -1, keys.shape[1])
    output = (rows @ clean).view(*queries.shape[:2], values.shape[2])
    return output.to(queries.dtype), lse.float()
