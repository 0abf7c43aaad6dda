"""The choice by the compiled radix search."""

from __future__ import annotations

from ctypes import c_int64, c_void_p

import torch
from torch import Tensor

from loopserve.kernels.native import library
from loopserve.kernels.native.arrays import rows_of


def limit(scores: Tensor, *_: object, **__: object) -> str | None:
    """What it cannot serve."""
    return None if scores.shape[1] else "no columns"


def top_columns(
    scores: Tensor, budget: int, *, sink_tokens: int, recent_window: int, first_valid: Tensor | None
) -> Tensor:
    """See the package."""
    scores = rows_of(scores.float())
    starts = None if first_valid is None else first_valid.contiguous()
    heads, total = scores.shape
    columns = torch.empty(heads, budget, dtype=torch.long)
    library.call("top_columns", *[c_void_p] * 3, *[c_int64] * 7)(
        scores.data_ptr(),
        None if starts is None else starts.data_ptr(),
        columns.data_ptr(),
        heads,
        total,
        scores.stride(0),
        budget,
        sink_tokens,
        recent_window,
        library.threads(),
    )
    return columns
