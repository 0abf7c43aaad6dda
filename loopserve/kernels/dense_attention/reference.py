"""Define dense attention: all visible cells, one softmax per row."""

from __future__ import annotations

from torch import Tensor

from loopserve.kernels.masked import masked_attention, per_query_head, query_columns, visible


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
    need_lse: bool = True,
) -> tuple[Tensor, Tensor]:
    """See the package. The log-sum-exp has no extra cost here and is always returned."""
    seen = visible(query_columns(queries, keys, columns), keys.shape[1], window=window, first_valid=first_valid)
    mask = per_query_head(seen, queries.shape[0])
    return masked_attention(queries, keys, values, mask, scaling=scaling, softcap=softcap)
