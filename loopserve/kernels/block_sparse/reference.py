"""Block attention by definition: tiles spread into a mask, then masked attention."""

from __future__ import annotations

from torch import Tensor

from loopserve.kernels.dense_attention.reference import masked_attention
from loopserve.kernels.shapes import query_columns, visible


def block_mask(blocks: Tensor, tile: int, rows: int, total: int) -> Tensor:
    """Tiles spread to cells, causality aside: bool ``[Hq, rows, total]``."""
    return blocks.repeat_interleave(tile, dim=1)[:, :rows].repeat_interleave(tile, dim=2)[:, :, :total]


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
    seen = visible(query_columns(queries, keys, None), keys.shape[1], first_valid=first_valid)
    mask = block_mask(blocks, tile, queries.shape[1], keys.shape[1]).unflatten(0, (keys.shape[0], -1))
    return masked_attention(
        queries, keys, values, mask & (seen if seen.dim() == 2 else seen[:, None]), scaling=scaling, softcap=softcap
    )
