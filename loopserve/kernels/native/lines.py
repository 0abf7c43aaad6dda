"""The compiled choice of lines, from given softmax rows or from the queries whose rows they are."""

from __future__ import annotations

from ctypes import POINTER, Structure, byref, c_double, c_int64, c_void_p

import torch
from torch import Tensor

from loopserve.kernels.native import library
from loopserve.kernels.native.arrays import rows_of
from loopserve.kernels.native.scores import Scores


class _Selection(Structure):
    """``Selection`` of select_lines.c."""

    _fields_ = [  # ctypes wants a plain list
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
    """(chosen bool ``[Hq, 2, n]``, covered mass and whole mass per row float64 ``[Hq, r]`` each, cost ``[Hq]``).

    Softmax rows ``[Hq, r, n]`` are given, or made from queries ``[Hq, r, D]`` and keys ``[Hkv, n, D]`` and not kept.
    """
    heads, rows = row_weights.shape
    total = forced.shape[2]
    chosen = torch.empty(heads, 2, total, dtype=torch.bool)
    covered, mass = torch.empty(2, heads, rows, dtype=torch.float64)
    spent = torch.empty(heads, dtype=torch.float64)
    columns, row_weights, forced = columns.contiguous(), row_weights.float().contiguous(), forced.contiguous()
    source = Scores(columns=columns.data_ptr(), heads=heads, group=1, rows=rows, total=total, threads=library.threads())
    given = None
    if probabilities is not None:
        given = probabilities.float().contiguous()
    else:
        assert queries is not None and keys is not None
        queries, keys = queries.contiguous(), rows_of(keys)
        first_valid = None if first_valid is None else first_valid.contiguous()
        source.queries, source.keys, source.scaling = queries.data_ptr(), keys.data_ptr(), scaling
        source.first_valid = None if first_valid is None else first_valid.data_ptr()
        source.key_head, source.key_row = keys.stride(0), keys.stride(1)
        source.group, source.dim = heads // keys.shape[0], queries.shape[2]
        source.half = queries.dtype is not torch.float32
    call = _Selection(
        source,
        None if given is None else given.data_ptr(),
        row_weights.data_ptr(),
        forced.data_ptr(),
        chosen.data_ptr(),
        covered.data_ptr(),
        mass.data_ptr(),
        spent.data_ptr(),
        new_tokens,
        tile or 0,
        alpha,
        row_floor,
        most_cost,
    )
    library.call("select_lines", POINTER(_Selection))(byref(call))
    return chosen, covered, mass, spent
