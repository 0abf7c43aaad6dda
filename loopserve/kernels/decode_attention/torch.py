"""Compute dense attention over the active set, after copying the chosen columns together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from loopserve.kernels.decode_attention.request import DecodeRequest
from loopserve.kernels.dense_attention.torch import dense_attention
from loopserve.kernels.gather_kv.torch import gather_kv


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
) -> tuple[Tensor, Tensor | None]:
    """See the package."""
    if columns is not None:
        keys, values, first_valid = active_pairs(keys, values, columns, tail)
    return dense_attention(
        queries, keys, values, scaling=scaling, softcap=softcap, first_valid=first_valid, need_lse=need_lse
    )


def active_pairs(keys: Tensor, values: Tensor, columns: Tensor, tail: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return a copy of the chosen columns and all columns from ``tail`` on, and where filler ends in each head that
    keeps fewer.
    """
    fillers = (columns < 0).sum(1)
    copies = gather_kv(keys, values, columns.clamp(min=0))
    own_keys, own_values = (
        torch.cat([copy, whole[:, tail:]], dim=1) for copy, whole in zip(copies, (keys, values), strict=True)
    )
    return own_keys, own_values, fillers if bool(fillers.any()) else None


def decode_attention_batch(
    _: Tensor, requests: Sequence[DecodeRequest], *, scaling: float, softcap: float | None, need_lse: bool = True
) -> list[tuple[Tensor, Tensor | None]]:
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
