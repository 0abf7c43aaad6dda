"""Compute attention of new queries on the key tiles that are selected per head and query tile."""

from __future__ import annotations

import torch
from torch import Tensor

from loopserve.kernels import backend
from loopserve.kernels.backend import check, check_flags
from loopserve.kernels.gpu import limits
from loopserve.kernels.masked import (
    additive_mask,
    fused,
    masked_attention,
    per_query_head,
    query_columns,
    serves,
    settle,
    visible,
)
from loopserve.kernels.native import attention

# A tile larger than the number of columns is one tile. Clamping keeps the size within an int64 of the C kernel.
_LARGEST = 128
_OPERATION = backend.operation(
    "block_sparse",
    torch="block_sparse",
    cpu="native.attention",
    triton="gpu.block_sparse",
    limits={"cpu": attention.limit, "triton": limits.blocks},
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


def block_sparse_reference(
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
    """Define block-sparse attention: expand the tiles to a mask, then compute masked attention."""
    rows, total = queries.shape[1], keys.shape[1]
    cells = blocks.repeat_interleave(tile, dim=1)[:, :rows].repeat_interleave(tile, dim=2)[:, :, :total]
    seen = visible(query_columns(queries, keys), total, first_valid=first_valid)
    mask = cells & per_query_head(seen, queries.shape[0])
    return masked_attention(queries, keys, values, mask, scaling=scaling, softcap=softcap)


def block_sparse_torch(
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
    """Compute block-sparse attention per query tile, over a copy of its key tiles."""
    heads, rows = queries.shape[:2]
    history, group = keys.shape[1] - rows, heads // keys.shape[0]
    starts = [0] * keys.shape[0] if first_valid is None else first_valid.tolist()
    output = queries.new_zeros(heads, rows, values.shape[2])
    lse = torch.full((heads, rows), float("-inf"), dtype=torch.float32, device=queries.device)
    inside = torch.arange(tile, device=queries.device)
    for head, tiles in enumerate(blocks):
        owner = head // group
        for number, chosen in enumerate(tiles):
            start, end = number * tile, min((number + 1) * tile, rows)
            columns = (chosen.nonzero() * tile + inside).flatten()
            columns = columns[(columns >= starts[owner]) & (columns < history + end)]
            if not len(columns):
                continue
            part = (
                queries[head, start:end],
                keys[owner].index_select(0, columns),
                values[owner].index_select(0, columns),
            )
            # Columns ascend, so the last one shows whether any lies after the tile's first row.
            later = columns > torch.arange(history + start, history + end, device=columns.device)[:, None]
            if serves(values, queries.shape[2], softcap):
                mask = additive_mask(later) if int(columns[-1]) > history + start else None
                found, found_lse = fused(*(each[None, None] for each in part), scaling=scaling, mask=mask)
                found, found_lse = settle(found[0], found_lse[0])
            else:
                one, its_keys, its_values = (each[None] for each in part)
                found, found_lse = masked_attention(
                    one, its_keys, its_values, ~later[None], scaling=scaling, softcap=softcap
                )
            output[head, start:end], lse[head, start:end] = found[0], found_lse[0]
    return output, lse
