"""Attention over the active set by the compiled kernels."""

from __future__ import annotations

from torch import Tensor

from loopserve.kernels.dense_attention.cpu import dense_attention
from loopserve.kernels.native.attention import attend, serves


def limit(queries: Tensor, keys: Tensor, values: Tensor, *, softcap: float | None, **_: object) -> str | None:
    """What it cannot serve."""
    return serves(queries, values, softcap)


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
    if columns is None:
        return dense_attention(queries, keys, values, scaling=scaling, first_valid=first_valid)
    return attend(queries, keys, values, scaling=scaling, kernel="decode_attention", columns=columns, tail=tail)
