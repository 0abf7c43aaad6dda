"""Attention of the newest few queries over an active set: a copy of its own, or chosen columns of the store in place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from loopserve.kernels import backend
from loopserve.kernels.decode_attention import cpu
from loopserve.kernels.gpu import limits
from loopserve.kernels.shapes import check, check_device, check_range

_OPERATION = backend.operation(
    "decode_attention", "packed", "cpu", "triton", limits={"cpu": cpu.limit, "triton": limits.attention}
)


def decode_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    scaling: float,
    softcap: float | None = None,
    first_valid: Tensor | None = None,
    columns: Tensor | None = None,
    tail: int = 0,
    need_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """(output ``[Hq, t, D]``, log-sum-exp float32 ``[Hq, t]`` if asked for) of queries ``[Hq, t, D]`` over ``[Hkv, n, D]``.

    The last t columns are the queries' own tokens, causal among themselves. Every column is attended; with ``columns`` int64 ``[Hkv,
    S]`` only those (sorted, below ``tail``, left-padded with -1 where a head keeps fewer) and every column from ``tail`` on.
    first_valid ``[Hkv]``: columns before it are filler of heads that hold fewer pairs. ValueError for what does not fit.
    """
    check("decode_attention", queries, keys, values, first_valid=first_valid)
    if columns is not None:
        if (
            columns.dim() != 2
            or columns.shape[0] != keys.shape[0]
            or columns.dtype != torch.long
            or first_valid is not None
        ):
            raise ValueError(
                f"decode_attention: columns {columns.dtype} {list(columns.shape)} must be int64 [{keys.shape[0]}, S], "
                "of a store without filler"
            )
        if not 0 <= tail <= keys.shape[1] - queries.shape[1]:
            raise ValueError(
                f"decode_attention: tail={tail} must lie before the queries' own columns of {keys.shape[1]}"
            )
        check_device("decode_attention", "columns", columns, keys.device)
        if columns.device.type == "cpu":
            check_range("decode_attention: columns (plus one)", columns + 1, tail + 1)
    output, lse = _OPERATION(
        queries,
        keys,
        values,
        scaling=scaling,
        softcap=softcap,
        first_valid=first_valid,
        columns=columns,
        tail=tail,
        need_lse=need_lse,
    )
    return output, lse if need_lse else None


class DecodeRequest(NamedTuple):
    """Hold one session's arguments of ``decode_attention``; see there."""

    queries: Tensor
    keys: Tensor
    values: Tensor
    first_valid: Tensor | None = None
    columns: Tensor | None = None
    tail: int = 0


def decode_attention_batch(
    requests: Sequence[DecodeRequest], *, scaling: float, softcap: float | None = None, need_lse: bool = False
) -> list[tuple[Tensor, Tensor | None]]:
    """Return what ``decode_attention`` gives for each of several sessions, whose lengths and selections may differ."""
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
