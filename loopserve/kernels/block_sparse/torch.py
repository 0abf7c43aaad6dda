"""Compute block-sparse attention per query tile, over a copy of its key tiles."""

from __future__ import annotations

import torch
from torch import Tensor

from loopserve.kernels.fused import MASKED, fused, serves, settle
from loopserve.kernels.masked import masked_attention


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
                mask = None
                if int(columns[-1]) > history + start:
                    mask = torch.zeros(later.shape, dtype=torch.float32, device=later.device).masked_fill_(
                        later, MASKED
                    )
                found, found_lse = fused(*(each[None, None] for each in part), scaling=scaling, mask=mask)
                found, found_lse = settle(found[0], found_lse[0])
            else:
                one, its_keys, its_values = (each[None] for each in part)
                found, found_lse = masked_attention(
                    one, its_keys, its_values, ~later[None], scaling=scaling, softcap=softcap
                )
            output[head, start:end], lse[head, start:end] = found[0], found_lse[0]
    return output, lse
