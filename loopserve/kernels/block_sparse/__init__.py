"""Compute attention of new queries on the key tiles that are selected per head and query tile."""

from __future__ import annotations

from torch import Tensor

from loopserve.kernels import backend
from loopserve.kernels.block_sparse import cpu
from loopserve.kernels.gpu import limits
from loopserve.kernels.shapes import check, check_flags

# A tile larger than the number of columns is one tile. Clamping keeps the size within an int64 of the C kernel.
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
    """Return output ``[Hq, Tq, D]`` and log-sum-exp float32 ``[Hq, Tq]`` over the selected tiles, causal within them.

    The queries are the last Tq columns. blocks: bool ``[Hq, ceil(Tq / tile), ceil(Tk / tile)]``. Query tiles are
    counted from the first query, key tiles from column 0. A row without a selected cell gets output 0 and log-sum-exp
    -inf. Raises ValueError for arguments that do not fit together.
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
