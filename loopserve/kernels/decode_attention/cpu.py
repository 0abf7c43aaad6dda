"""Run attention over the active set with the compiled C kernels."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from loopserve.kernels.decode_attention.request import DecodeRequest
from loopserve.kernels.dense_attention.cpu import FEW, dense_attention
from loopserve.kernels.native.arrays import MOST_COLUMNS
from loopserve.kernels.native.attention import attend, attend_batch, serves


def limit(queries: Tensor, keys: Tensor, values: Tensor, *, softcap: float | None, **_: object) -> str | None:
    """Return why the kernel cannot serve these arguments, or None."""
    return serves(queries, values, softcap)


def batch_limit(_: Tensor, requests: Sequence[DecodeRequest], *, softcap: float | None, **__: object) -> str | None:
    """Return why the kernel cannot serve a batch, or None. The requests agree in all but their lengths."""
    problem = serves(requests[0].queries, requests[0].values, softcap)
    if problem is None and max([each.keys.shape[1] for each in requests]) > MOST_COLUMNS:
        return f"more than {MOST_COLUMNS} columns"
    return problem


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
    if columns is None:
        return dense_attention(queries, keys, values, scaling=scaling, first_valid=first_valid)
    return attend(queries, keys, values, scaling=scaling, kernel="decode_attention", columns=columns, tail=tail)


def decode_attention_batch(
    _: Tensor, requests: Sequence[DecodeRequest], *, scaling: float, softcap: float | None, need_lse: bool = True
) -> list[tuple[Tensor, Tensor | None]]:
    """See the package. Each result equals that of ``decode_attention`` for the request alone, bit by bit."""
    group = requests[0].queries.shape[0] // requests[0].keys.shape[0]
    most = FEW // group
    together = [each.columns is not None or each.queries.shape[1] <= most for each in requests]
    if all(together):
        return attend_batch(requests, scaling=scaling, need_lse=need_lse)
    few_rows = [each for each, few in zip(requests, together, strict=True) if few]
    found = iter(attend_batch(few_rows, scaling=scaling, need_lse=need_lse) if few_rows else ())
    return [
        next(found)
        if few
        else dense_attention(each.queries, each.keys, each.values, scaling=scaling, first_valid=each.first_valid)
        for each, few in zip(requests, together, strict=True)
    ]
