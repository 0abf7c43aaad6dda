"""Define block-sparse attention: expand the tiles to a mask, then compute masked attention."""

from __future__ import annotations

from torch import Tensor

from loopserve.kernels.masked import masked_attention, per_query_head, query_columns, visible


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
    cells = blocks.repeat_interleave(tile, dim=1)[:, :rows].repeat_interleave(tile, dim=2)[:, :, :total]
    seen = visible(query_columns(queries, keys), total, first_valid=first_valid)
    mask = cells & per_query_head(seen, queries.shape[0])
    return masked_attention(queries, keys, values, mask, scaling=scaling, softcap=softcap)
