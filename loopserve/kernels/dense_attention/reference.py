"""Dense attention as one reads it in a paper."""

from __future__ import annotations

from torch import Tensor

from loopserve.kernels.shapes import query_columns, scores, visible


def masked_attention(
    queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor, *, scaling: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """Softmax attention over the cells of a bool mask ``[..., Tq, Tk]`` that broadcasts to ``[Hkv, group, Tq, Tk]``."""
    found = scores(queries, keys, scaling=scaling, softcap=softcap).masked_fill(~mask, float("-inf"))
    lse = found.logsumexp(-1)
    probabilities = (found - lse[..., None]).exp().nan_to_num(0.0)
    output = probabilities @ values.to(probabilities.dtype)[:, None]
    return output.flatten(0, 1).to(queries.dtype), lse.flatten(0, 1)


def dense_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    scaling: float,
    softcap: float | None = None,
    window: int | None = None,
    columns: Tensor | None = None,
    first_valid: Tensor | None = None,
    need_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """See the package."""
    mask = visible(query_columns(queries, keys, columns), keys.shape[1], window=window, first_valid=first_valid)
    if mask.dim() == 3:
        mask = mask[:, None]
    return masked_attention(queries, keys, values, mask, scaling=scaling, softcap=softcap)
