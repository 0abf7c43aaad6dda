"""Attention of the newest few queries over an active set whose heads may hold different numbers of pairs."""

from __future__ import annotations

from torch import Tensor

from loopserve.kernels.dense_attention import dense_attention


def decode_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    scaling: float,
    softcap: float | None = None,
    first_valid: Tensor | None = None,
    need_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """(output ``[Hq, t, D]``, log-sum-exp ``[Hq, t]`` if asked for). The last t columns are the queries' own tokens."""
    return dense_attention(
        queries, keys, values, scaling=scaling, softcap=softcap, first_valid=first_valid, need_lse=need_lse
    )
