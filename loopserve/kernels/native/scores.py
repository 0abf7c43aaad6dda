"""Call the compiled softmax rows and what is made of them: line masses, token scores, the selection of lines."""

from __future__ import annotations

from ctypes import POINTER, Structure, byref, c_double, c_float, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor

from loopserve.kernels.native import library
from loopserve.kernels.native.library import address, large_pages, number_type, optional, rows_of

JOINS = ("mean", "sum", "max")
_ROWS = 64  # rows per tile, as in tile.h
_MOST_COLUMNS = 1 << 24  # rows.h compares columns as float32, which is exact up to here


class _Scores(Structure):
    """Mirror the struct ``Scores`` of rows.h; strides count numbers."""

    _fields_ = [  # ctypes requires a list
        *((name, c_void_p) for name in ("queries", "keys", "columns", "first_valid")),
        *((name, c_void_p) for name in ("probabilities", "vertical", "slash", "tokens")),
        *((name, c_int64) for name in ("key_head", "key_row")),
        *((name, c_int64) for name in ("heads", "group", "rows", "total", "dim", "half", "join", "threads")),
        ("scaling", c_float),
    ]


def limit(queries: Tensor, keys: Tensor, *_: object, softcap: float | None, **__: object) -> str | None:
    """Return why the compiled scores cannot serve these arguments, or None."""
    if softcap:
        return "softcap"
    if keys.shape[1] > _MOST_COLUMNS:
        return f"more than {_MOST_COLUMNS} columns"
    dim, step = queries.shape[-1], 16 if queries.dtype is torch.float32 else 32
    return None if dim % step == 0 else f"{dim} channels are not a multiple of {step}"


def token_limit(
    queries: Tensor, keys: Tensor, *_: object, softcap: float | None, over_rows: str, **__: object
) -> str | None:
    """Return why the compiled token scores cannot serve these arguments, or None."""
    if over_rows == "max" and queries.shape[1] > _ROWS:
        return f"the maximum over {queries.shape[1]} rows"
    return limit(queries, keys, softcap=softcap)


def line_scores(
    queries: Tensor, keys: Tensor, columns: Tensor, *, scaling: float, softcap: float | None, first_valid: Tensor | None
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
    queries: Tensor,
    keys: Tensor,
    columns: Tensor,
    *,
    scaling: float,
    softcap: float | None,
    first_valid: Tensor | None,
    over_rows: str,
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
    call = _Scores(
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
    library.call(name, POINTER(_Scores))(byref(call))


class _Selection(Structure):
    """Mirror the struct ``Selection`` of greedy.h."""

    _fields_ = [  # ctypes requires a list
        ("scores", _Scores),
        *((name, c_void_p) for name in ("given", "weights", "forced", "chosen", "covered", "mass", "spent")),
        ("new_tokens", c_int64),
        ("tile", c_int64),
        ("alpha", c_double),
        ("floor", c_double),
        ("most_cost", c_double),
        ("least_weight", c_double),
    ]


def _select(
    columns: Tensor,
    new_tokens: int,
    *,
    alpha: float,
    tile: int | None,
    row_weights: Tensor,
    row_floor: float,
    most_cost: float,
    least_weight: float,
    forced: Tensor,
    probabilities: Tensor | None = None,
    queries: Tensor | None = None,
    keys: Tensor | None = None,
    scaling: float = 1.0,
    first_valid: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return chosen lines bool ``[Hq, 2, n]``, covered and total mass per row float64 ``[Hq, r]`` each, cost ``[Hq]``.

    Softmax rows ``[Hq, r, n]`` are given, or computed from queries ``[Hq, r, D]`` and keys ``[Hkv, n, D]`` and
    discarded.
    """
    heads, rows = row_weights.shape
    total = forced.shape[2]
    chosen = torch.empty(heads, 2, total, dtype=torch.bool, device="cpu")
    covered, mass = torch.empty(2, heads, rows, dtype=torch.float64, device="cpu")
    spent = torch.empty(heads, dtype=torch.float64, device="cpu")
    columns, row_weights, forced = columns.contiguous(), row_weights.float().contiguous(), forced.contiguous()
    source = _Scores(
        columns=address("columns", columns, torch.long, (rows,)),
        heads=heads,
        group=1,
        rows=rows,
        total=total,
        threads=library.threads(),
    )
    given = None
    if probabilities is not None:
        given = probabilities.float().contiguous()
    else:
        assert queries is not None and keys is not None
        queries, keys = queries.contiguous(), rows_of(keys)
        first_valid = None if first_valid is None else first_valid.contiguous()
        kind, owners, dim = number_type(queries), keys.shape[0], queries.shape[2]
        source.queries = address("queries", queries, kind, (heads, rows, dim))
        source.keys = address("keys", keys, kind, (owners, total, dim), strided=2)
        source.first_valid = optional("first_valid", first_valid, torch.long, (owners,))
        source.key_head, source.key_row = keys.stride(0), keys.stride(1)
        source.group, source.dim = heads // owners, dim
        source.half, source.scaling = kind is torch.bfloat16, scaling
    call = _Selection(
        source,
        optional("probabilities", given, torch.float32, (heads, rows, total)),
        address("row_weights", row_weights, torch.float32, (heads, rows)),
        address("forced", forced, torch.bool, (heads, 2, total)),
        address("chosen", chosen, torch.bool, (heads, 2, total)),
        address("covered", covered, torch.float64, (heads, rows)),
        address("mass", mass, torch.float64, (heads, rows)),
        address("spent", spent, torch.float64, (heads,)),
        new_tokens,
        tile or 0,
        alpha,
        row_floor,
        most_cost,
        least_weight,
    )
    library.call("select_lines", POINTER(_Selection))(byref(call))
    return chosen, covered, mass, spent


def choose_lines(
    queries: Tensor, keys: Tensor, columns: Tensor, new_tokens: int, *, softcap: float | None, **options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return chosen lines bool ``[Hq, 2, n]``, covered and total mass per row ``[Hq, r]``, cost ``[Hq]``.

    The softmax rows are computed one head at a time and discarded.
    """
    return _select(columns, new_tokens, queries=queries, keys=keys, **options)


def select_lines(
    probabilities: Tensor,
    columns: Tensor,
    new_tokens: int,
    *,
    alpha: float,
    tile: int | None,
    row_weights: Tensor,
    row_floor: float,
    most_cost: float,
    least_weight: float,
    forced: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Select by the exact greedy, one head at a time."""
    return _select(
        columns,
        new_tokens,
        alpha=alpha,
        tile=tile,
        row_weights=row_weights,
        row_floor=row_floor,
        most_cost=most_cost,
        least_weight=least_weight,
        forced=forced,
        probabilities=probabilities,
    )
