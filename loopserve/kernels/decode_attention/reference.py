"""Define decode attention: dense attention under a mask of the active columns."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from loopserve.kernels.decode_attention.request import DecodeRequest
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
    """See the package. The log-sum-exp has no extra cost here and is always returned."""
    mask = visible(query_columns(queries, keys), keys.shape[1], first_valid=first_valid)
    if columns is not None:
        active = torch.zeros(keys.shape[0], keys.shape[1] + 1, dtype=torch.bool, device=keys.device)
        active.scatter_(1, columns + 1, True)  # fillers are -1 and index the extra column
        active = active[:, 1:]
        active[:, tail:] = True
        mask = mask & active[:, None]
    return masked_attention(
        queries, keys, values, per_query_head(mask, queries.shape[0]), scaling=scaling, softcap=softcap
    )


def decode_attention_batch(
    _: Tensor, requests: Sequence[DecodeRequest], *, scaling: float, softcap: float | None, need_lse: bool = True
) -> list[tuple[Tensor, Tensor]]:
    """See the package."""
    return [
        decode_attention(
            each.queries,
            each.keys,
            each.values,
            scaling=scaling,
            softcap=softcap,
            first_valid=each.first_valid,
            columns=each.columns,
            tail=each.tail,
            need_lse=need_lse,
        )
        for each in requests
    ]
