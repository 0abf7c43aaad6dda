"""Call the compiled selection of lines, from given softmax rows or from queries and keys."""

from __future__ import annotations

from ctypes import POINTER, Structure, byref, c_double, c_int64, c_void_p

import torch
from torch import Tensor

from loopserve.kernels.native import library
from loopserve.kernels.native.arrays import address, number_type, optional, rows_of
from loopserve.kernels.native.scores import Scores


class _Selection(Structure):
    """Mirror the struct ``Selection`` of greedy.h."""

    _fields_ = [  # ctypes requires a list
        ("scores", Scores),
        *((name, c_void_p) for name in ("given", "weights", "forced", "chosen", "covered", "mass", "spent")),
        ("new_tokens", c_int64),
        ("tile", c_int64),
        ("alpha", c_double),
        ("floor", c_double),
        ("most_cost", c_double),
    ]


def select(
    columns: Tensor,
    new_tokens: int,
    *,
    alpha: float,
    tile: int | None,
    row_weights: Tensor,
    row_floor: float,
    most_cost: float,
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
    source = Scores(
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
    )
    library.call("select_lines", POINTER(_Selection))(byref(call))
    return chosen, covered, mass, spent
