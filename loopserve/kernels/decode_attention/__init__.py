"""Compute attention of the last few queries over an active set: a separate copy, or chosen columns of the store in
place.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from loopserve.kernels import backend
from loopserve.kernels.decode_attention import cpu
from loopserve.kernels.decode_attention.request import DecodeRequest, check_request, check_requests
from loopserve.kernels.gpu import limits

__all__ = ["DecodeRequest", "decode_attention", "decode_attention_batch"]
_OPERATION = backend.operation(
    "decode_attention", "torch", "cpu", "triton", limits={"cpu": cpu.limit, "triton": limits.attention}
)
_BATCH = backend.operation(
    "decode_attention_batch",
    "torch",
    "cpu",
    "triton",
    package="decode_attention",
    limits={"cpu": cpu.batch_limit, "triton": limits.decode_batch},
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
    """Return output ``[Hq, t, D]`` and, with ``need_lse``, log-sum-exp float32 ``[Hq, t]`` of queries ``[Hq, t, D]``
    over keys ``[Hkv, n, D]``.

    The last t columns belong to the queries themselves and are causal. Without ``columns`` every column is attended.
    columns int64 ``[Hkv, S]``: attend these and every column from ``tail`` on. They must be sorted, below ``tail``, and
    left-padded with -1 where a head keeps fewer. first_valid ``[Hkv]``: columns before it are filler of heads that hold
    fewer pairs. Raises ValueError for arguments that do not fit together.
    """
    check_request("decode_attention", DecodeRequest(queries, keys, values, first_valid, columns, tail))
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


def decode_attention_batch(
    requests: Sequence[DecodeRequest], *, scaling: float, softcap: float | None = None, need_lse: bool = False
) -> list[tuple[Tensor, Tensor | None]]:
    """Return the results of ``decode_attention`` for several sessions of one layer, computed by one kernel call.

    Sessions may differ in t, in the number of keys and in the chosen columns. The outputs are read-only: where t is the
    same for all, they may be views of one tensor ``[sessions, Hq, t, D]``. Raises ValueError that names the request
    that does not fit.
    """
    if not requests:
        return []
    check_requests("decode_attention_batch", requests)
    found: list[tuple[Tensor, Tensor | None]] = _BATCH(
        requests[0].queries, requests, scaling=scaling, softcap=softcap, need_lse=need_lse
    )
    return found if need_lse else [(output, None) for output, _ in found]
