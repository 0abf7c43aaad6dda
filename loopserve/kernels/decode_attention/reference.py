"""Dense attention under a mask of what is active."""

from __future__ import annotations

import torch
from torch import Tensor

from loopserve.kernels.masked import masked_attention, per_query_head, query_columns, visible


def decode_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    scaling: float,
    softcap: float | None,
    first_valid: Tensor | None,
    columns: Tensor | None,
    tail: int,
    need_lse: bool = True,
) -> tuple[Tensor, Tensor]:
    """See the package. The log-sum-exp costs nothing here and always comes."""
    mask = visible(query_columns(queries, keys), keys.shape[1], first_valid=first_valid)
    if columns is not None:
        active = torch.zeros(keys.shape[0], keys.shape[1] + 1, dtype=torch.bool, device=keys.device)
        active.scatter_(1, columns + 1, True)  # fillers are -1 and fall into the extra column
        active = active[:, 1:]
        active[:, tail:] = True
        mask = mask & active[:, None]
    return masked_attention(
        queries, keys, values, per_query_head(mask, queries.shape[0]), scaling=scaling, softcap=softcap
    )
