"""Define the arguments of one session in a batch of decode steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from loopserve.kernels.shapes import check, check_device, check_range


class DecodeRequest(NamedTuple):
    """Hold one session's arguments of ``decode_attention``, where they are documented."""

    queries: Tensor
    keys: Tensor
    values: Tensor
    first_valid: Tensor | None = None
    columns: Tensor | None = None
    tail: int = 0


def check_request(op: str, request: DecodeRequest) -> None:
    """Raise ValueError unless the tensors of a request fit together."""
    queries, keys, values, first_valid, columns, tail = request
    check(op, queries, keys, values, first_valid=first_valid)
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
    first, held, pairs = (each.shape for each in requests[0][:3])
    kind, device = requests[0].queries.dtype, requests[0].queries.device
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
