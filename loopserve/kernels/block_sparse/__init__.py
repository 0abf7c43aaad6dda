"""Attention of new queries on a list of key tiles per query tile and head."""

from __future__ import annotations

from torch import Tensor

from loopserve.kernels import backend
from loopserve.kernels.block_sparse import cpu
from loopserve.kernels.gpu import limits
from loopserve.kernels.shapes import check, check_flags

# A tile beyond the last column is one tile, however large. A number that an int64 has no room for would wrap round in C.
_LARGEST = 128
_OPERATION = backend.operation(
    "block_sparse", "torch", "cpu", "triton", limits={"cpu": cpu.limit, "triton": limits.blocks}
)


def block_sparse(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    blocks: Tensor,
    *,
    tile: int = 64,
    scaling: float,
    softcap: float | None = None,
    first_valid: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(output ``[Hq, Tq, D]``, log-sum-exp float32 ``[Hq, Tq]``) of end-aligned queries over the chosen tiles, causal
    inside them.

    blocks: bool ``[Hq, ceil(Tq / tile), ceil(Tk / tile)]``; query tiles count from the first query, key tiles from
    column 0. A row without a cell gives 0 and -inf. ValueError for shapes that do not fit.
    """
    check("block_sparse", queries, keys, values, first_valid=first_valid)
    if tile < 1:
        raise ValueError(f"block_sparse: tile={tile} must be at least 1")
    wanted = (queries.shape[0], -(-queries.shape[1] // tile), -(-keys.shape[1] // tile))
    check_flags("block_sparse", "blocks", blocks, wanted, queries.device)
    tile = min(tile, max(keys.shape[1], _LARGEST))
    found: tuple[Tensor, Tensor] = _OPERATION(
        queries, keys, values, blocks, tile=tile, scaling=scaling, softcap=softcap, first_valid=first_valid
    )
    return found
