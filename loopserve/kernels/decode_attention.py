"""Compute attention of the last few queries over an active set: a separate copy, or chosen columns of the store in
place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from loopserve.kernels import backend
from loopserve.kernels.backend import check, check_device, check_range
from loopserve.kernels.dense_attention import dense_attention_torch
from loopserve.kernels.gather_kv import gather_kv_torch
from loopserve.kernels.gpu import limits
from loopserve.kernels.masked import masked_attention, per_query_head, query_columns, visible
from loopserve.kernels.native import attention
from loopserve.kernels.paged import Paged, Rows, check_paged, gathered

_OPERATION = backend.operation(
    "decode_attention",
    torch="decode_attention",
    cpu="native.attention",
    triton="gpu.decode_attention",
    limits={"cpu": attention.limit, "triton": limits.attention},
)
_BATCH = backend.operation(
    "decode_attention_batch",
    reference="decode_attention",
    torch="decode_attention",
    cpu="native.attention",
    triton="gpu.decode_batch",
    limits={"cpu": attention.batch_limit, "triton": limits.decode_batch},
)


class DecodeRequest(NamedTuple):
    """Hold one session's arguments of ``decode_attention``, where they are documented."""

    queries: Tensor
    keys: Rows
    values: Rows
    first_valid: Tensor | None = None
    columns: Tensor | None = None
    tail: int = 0


def decode_attention(
    queries: Tensor,
    keys: Rows,
    values: Rows,
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
    fewer pairs. Keys and values may lie in the blocks of a paged cache. Raises ValueError for arguments that do not fit
    together.
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
    requests: Sequence[DecodeRequest],
    *,
    scaling: float,
    softcap: float | None = None,
    need_lse: bool = False,
    checked: bool = False,
) -> list[tuple[Tensor, Tensor | None]]:
    """Return the results of ``decode_attention`` for several sessions of one layer, computed by one kernel call.

    Sessions may differ in t, in the number of keys and in the chosen columns. The outputs are read-only: where t is the
    same for all, they may be views of one tensor ``[sessions, Hq, t, D]``. checked: the caller has made sure that the
    requests fit together. Raises ValueError that names the request that does not fit.
    """
    if not requests:
        return []
    if not checked:
        check_requests("decode_attention_batch", requests)
    found: list[tuple[Tensor, Tensor | None]] = _BATCH(
        requests[0].queries, requests, scaling=scaling, softcap=softcap, need_lse=need_lse
    )
    return found if need_lse else [(output, None) for output, _ in found]


def reads_blocks(keys: Paged, values: Paged) -> bool:
    """Return whether the implementation that serves attention over these blocks reads them in place; others gather all."""
    chosen = _OPERATION.choose(keys.device.type, keys.dtype).name
    return chosen == "triton" and limits.attention(keys.blocks[:, 0], keys, values) is None


def check_request(op: str, request: DecodeRequest) -> None:
    """Raise ValueError unless the tensors of a request fit together."""
    queries, keys, values, first_valid, columns, tail = request
    check(op, queries, keys, values, first_valid=first_valid)
    check_paged(op, keys, values)
    if columns is None:
        return
    shape = columns.shape
    if len(shape) != 2 or shape[0] != keys.shape[0] or columns.dtype is not torch.long or first_valid is not None:
        raise ValueError(
            f"{op}: columns {columns.dtype} {list(shape)} must be int64 [{keys.shape[0]}, S], of a store without filler"
        )
    if not 0 <= tail <= keys.shape[1] - queries.shape[1]:
        raise ValueError(f"{op}: tail={tail} must lie before the queries' own columns of {keys.shape[1]}")
    check_device(op, "columns", columns, keys.device)
    if columns.device.type == "cpu":
        check_range(f"{op}: columns", columns, tail, lowest=-1)


def check_requests(op: str, requests: Sequence[DecodeRequest]) -> None:
    """Raise ValueError that names the request unless each request fits and all belong to one layer.

    Requests may differ in t, in the number of keys and in the chosen columns.
    """
    example = requests[0]
    first, held, pairs = example.queries.shape, example.keys.shape, example.values.shape
    kind, device = example.queries.dtype, example.queries.device
    for index, request in enumerate(requests):
        check_request(f"{op}: request {index}", request)
        rows, keys, values = request.queries.shape, request.keys.shape, request.values.shape
        alike = rows[0] == first[0] and rows[2] == first[2] and keys[0] == held[0] and values[2] == pairs[2]
        if not alike or request.queries.dtype is not kind or request.queries.device != device:
            raise ValueError(
                f"{op}: request {index} has {_described(request)}; request 0, of the same layer, has {_described(requests[0])}"
            )


def _described(request: DecodeRequest) -> str:
    queries, keys, values = request[:3]
    sizes = f"queries {list(queries.shape)}, keys {list(keys.shape)} and values {list(values.shape)}"
    return f"{sizes} in {queries.dtype} on {queries.device}"


def decode_attention_reference(
    queries: Tensor,
    keys: Rows,
    values: Rows,
    *,
    scaling: float,
    softcap: float | None,
    first_valid: Tensor | None,
    columns: Tensor | None,
    tail: int,
    need_lse: bool = True,
) -> tuple[Tensor, Tensor]:
    """Define the result: dense attention under a mask of the active columns. The log-sum-exp is always returned."""
    keys, values = gathered(keys, values)
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


def decode_attention_batch_reference(
    _: Tensor, requests: Sequence[DecodeRequest], **options: Any
) -> list[tuple[Tensor, Tensor | None]]:
    """Compute one session after another."""
    return [
        decode_attention_reference(
            *each[:3], first_valid=each.first_valid, columns=each.columns, tail=each.tail, **options
        )
        for each in requests
    ]


def decode_attention_torch(
    queries: Tensor,
    keys: Rows,
    values: Rows,
    *,
    scaling: float,
    softcap: float | None,
    first_valid: Tensor | None,
    columns: Tensor | None,
    tail: int,
    need_lse: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Compute dense attention over the active set, after copying the chosen columns together."""
    keys, values = gathered(keys, values)
    if columns is not None:
        keys, values, first_valid = active_pairs(keys, values, columns, tail)
    return dense_attention_torch(
        queries, keys, values, scaling=scaling, softcap=softcap, first_valid=first_valid, need_lse=need_lse
    )


def active_pairs(keys: Tensor, values: Tensor, columns: Tensor, tail: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return a copy of the chosen columns and all columns from ``tail`` on, and where filler ends in each head that
    keeps fewer.
    """
    fillers = (columns < 0).sum(1)
    copies = gather_kv_torch(keys, values, columns.clamp(min=0))
    own_keys, own_values = (
        torch.cat([copy, whole[:, tail:]], dim=1) for copy, whole in zip(copies, (keys, values), strict=True)
    )
    return own_keys, own_values, fillers if bool(fillers.any()) else None


def decode_attention_batch_torch(
    _: Tensor, requests: Sequence[DecodeRequest], **options: Any
) -> list[tuple[Tensor, Tensor | None]]:
    """Compute one session after another."""
    return [
        decode_attention_torch(*each[:3], first_valid=each.first_valid, columns=each.columns, tail=each.tail, **options)
        for each in requests
    ]
