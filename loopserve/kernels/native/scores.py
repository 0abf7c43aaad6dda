"""Call the compiled softmax rows and their sums: line masses and token scores."""

from __future__ import annotations

from ctypes import POINTER, Structure, byref, c_float, c_int64, c_void_p

import torch
from torch import Tensor

from loopserve.kernels.memory import large_pages
from loopserve.kernels.native import library
from loopserve.kernels.native.arrays import address, number_type, optional, rows_of

JOINS = ("mean", "sum", "max")
_ROWS = 64  # rows per tile, as in tile.h
_MOST_COLUMNS = 1 << 24  # rows.h compares columns as float32, which is exact up to here


class Scores(Structure):
    """Mirror the struct ``Scores`` of rows.h; strides count numbers."""

    _fields_ = [  # ctypes requires a list
        *((name, c_void_p) for name in ("queries", "keys", "columns", "first_valid")),
        *((name, c_void_p) for name in ("probabilities", "vertical", "slash", "tokens")),
        *((name, c_int64) for name in ("key_head", "key_row")),
        *((name, c_int64) for name in ("heads", "group", "rows", "total", "dim", "half", "join", "threads")),
        ("scaling", c_float),
    ]


def serves(queries: Tensor, keys: Tensor, softcap: float | None) -> str | None:
    """Return why the compiled scores cannot serve these arguments, or None."""
    if softcap:
        return "softcap"
    if keys.shape[1] > _MOST_COLUMNS:
        return f"more than {_MOST_COLUMNS} columns"
    dim, step = queries.shape[-1], 16 if queries.dtype is torch.float32 else 32
    return None if dim % step == 0 else f"{dim} channels are not a multiple of {step}"


def serves_join(queries: Tensor, keys: Tensor, softcap: float | None, over_rows: str) -> str | None:
    """Return why the compiled token scores cannot serve these arguments, or None."""
    if over_rows == "max" and queries.shape[1] > _ROWS:
        return f"the maximum over {queries.shape[1]} rows"
    return serves(queries, keys, softcap)


def line_scores(
    queries: Tensor, keys: Tensor, columns: Tensor, *, scaling: float, first_valid: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return softmax rows ``[Hq, r, n]`` and masses of verticals and slashes ``[Hq, n]`` each, float32."""
    heads, rows, total = *queries.shape[:2], keys.shape[1]
    probabilities = large_pages(torch.empty(heads, rows, total, dtype=torch.float32, device="cpu"))
    vertical, slash = torch.empty(2, heads, total, dtype=torch.float32, device="cpu")
    pointers = (
        address("probabilities", probabilities, torch.float32, (heads, rows, total)),
        address("vertical", vertical, torch.float32, (heads, total)),
        address("slash", slash, torch.float32, (heads, total)),
        None,
    )
    _run("line_scores", queries, keys, columns, scaling, first_valid, pointers, 0)
    return probabilities, vertical, slash


def token_scores(
    queries: Tensor, keys: Tensor, columns: Tensor, *, scaling: float, first_valid: Tensor | None, over_rows: str
) -> Tensor:
    """Return scores ``[Hkv, n]``, float32."""
    tokens = torch.empty(keys.shape[:2], dtype=torch.float32, device="cpu")
    pointers = (None, None, None, address("tokens", tokens, torch.float32, (keys.shape[0], keys.shape[1])))
    _run("token_scores", queries, keys, columns, scaling, first_valid, pointers, JOINS.index(over_rows))
    return tokens


def _run(
    name: str,
    queries: Tensor,
    keys: Tensor,
    columns: Tensor,
    scaling: float,
    first_valid: Tensor | None,
    results: tuple[int | None, ...],
    join: int,
) -> None:
    queries, keys, columns = queries.contiguous(), rows_of(keys), columns.contiguous()
    starts = None if first_valid is None else first_valid.contiguous()
    kind = number_type(queries)
    (heads, rows, dim), (owners, total) = queries.shape, keys.shape[:2]
    call = Scores(
        address("queries", queries, kind, (heads, rows, dim)),
        address("keys", keys, kind, (owners, total, dim), strided=2),
        address("columns", columns, torch.long, (rows,)),
        optional("first_valid", starts, torch.long, (owners,)),
        *results,
        keys.stride(0),
        keys.stride(1),
        heads,
        heads // owners,
        rows,
        total,
        dim,
        kind is torch.bfloat16,
        join,
        library.threads(),
        scaling,
    )
    library.call(name, POINTER(Scores))(byref(call))
