"""Select columns with the compiled radix search."""

from __future__ import annotations

from ctypes import c_int64, c_void_p

import torch
from torch import Tensor

from loopserve.kernels.native import library
from loopserve.kernels.native.arrays import MOST_COLUMNS, address, optional, rows_of


def limit(scores: Tensor, *_: object, **__: object) -> str | None:
    """Return why the kernel cannot serve these arguments, or None."""
    if scores.shape[1] > MOST_COLUMNS:
        return f"more than {MOST_COLUMNS} columns"
    return None if scores.shape[1] else "no columns"


def top_columns(
    scores: Tensor, budget: int, *, sink_tokens: int, recent_window: int, first_valid: Tensor | None
) -> Tensor:
    """See the package."""
    scores = rows_of(scores.float())
    starts = None if first_valid is None else first_valid.contiguous()
    heads, total = scores.shape
    columns = torch.empty(heads, budget, dtype=torch.long, device="cpu")
    library.call("top_columns", *[c_void_p] * 3, *[c_int64] * 7)(
        address("scores", scores, torch.float32, (heads, total), strided=1),
        optional("first_valid", starts, torch.long, (heads,)),
        address("columns", columns, torch.long, (heads, budget)),
        heads,
        total,
        scores.stride(0),
        budget,
        sink_tokens,
        recent_window,
        library.threads(),
    )
    return columns
