"""Compute attention under an explicit mask, as the references do, or by PyTorch's fused CPU kernel; merge partial results."""

from __future__ import annotations

import torch
from torch import Tensor

# A finite value in place of -inf in additive masks. A fully masked row then has a log-sum-exp near it, which has no
# weight in a merge. With -inf the kernel returns output 0 and log-sum-exp 0.
MASKED = -1e30
_EMPTY = -1e29
_FUSED = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


def additive_mask(hidden: Tensor) -> Tensor:
    """Return the additive mask of cells that are not seen: float32, ``MASKED`` where ``hidden`` and 0 elsewhere."""
    return torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device).masked_fill_(hidden, MASKED)


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


def fused(
    queries: Tensor, keys: Tensor, values: Tensor, *, scaling: float, causal: bool = False, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return output ``[N, Hq, Tq, D]`` and log-sum-exp float32 ``[N, Hq, Tq]`` of queries ``[N, Hq, Tq, D]`` over keys
    ``[N, Hkv, Tk, D]``.

    causal: the diagonal starts at the upper left cell. mask: additive float32, broadcastable to ``[N, Hq, Tq, Tk]``.
    Serves float32, bfloat16 and float16; keys and values need one head size.
    """
    if (
        queries.stride(-1) != 1 or keys.stride(-1) != 1 or values.stride(-1) != 1
    ):  # the kernel assumes a dense last dimension
        queries, keys, values = queries.contiguous(), keys.contiguous(), values.contiguous()
    output, lse = _FUSED(queries, keys, values, 0.0, causal, attn_mask=mask, scale=scaling)
    return output, lse


def serves(values: Tensor, head_dim: int, softcap: float | None) -> bool:
    """Return whether the fused kernel supports this head size and softcap."""
    return not softcap and values.shape[-1] == head_dim


def merge(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Merge attention over two disjoint sets of keys.

    Each part is (output ``[..., Tq, D]``, log-sum-exp ``[..., Tq]``). Outputs are weighted by their log-sum-exps.
    """
    lse = torch.logaddexp(first[1], second[1])
    weights = [(part[1] - lse).exp_()[..., None] for part in (first, second)]
    return first[0] * weights[0] + second[0] * weights[1], lse


def settle(output: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Set rows that saw only masked cells to output 0 and log-sum-exp -inf."""
    empty = lse < _EMPTY
    if bool(empty.any()):
        return output.masked_fill(empty[..., None], 0.0), lse.masked_fill(empty, float("-inf"))
    return output, lse
