"""Call the compiled kernels on columns of a store: copy chosen pairs, select the best columns."""

from __future__ import annotations

from ctypes import c_int64, c_void_p

import torch
from torch import Tensor

from loopserve.kernels.native import library
from loopserve.kernels.native.library import MOST_COLUMNS, address, optional, rows_of


def gather_kv(keys: Tensor, values: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Copy pairs by one call for all heads, keys and values."""
    keys, values, indices = rows_of(keys), rows_of(values), rows_of(indices)
    heads, chosen = indices.shape
    key_copies = keys.new_empty(heads, chosen, keys.shape[2])
    value_copies = values.new_empty(heads, chosen, values.shape[2])
    kind, size, total = keys.dtype, keys.element_size(), keys.shape[1]
    library.function("gather_kv", *[c_void_p] * 5, *[c_int64] * 10)(
        address("keys", keys, kind, (heads, total, keys.shape[2]), strided=2),
        address("values", values, kind, (heads, total, values.shape[2]), strided=2),
        address("indices", indices, torch.long, (heads, chosen), strided=1),
        address("key_copies", key_copies, kind, (heads, chosen, keys.shape[2])),
        address("value_copies", value_copies, kind, (heads, chosen, values.shape[2])),
        heads,
        chosen,
        keys.shape[2] * size,
        values.shape[2] * size,
        keys.stride(0) * size,
        keys.stride(1) * size,
        values.stride(0) * size,
        values.stride(1) * size,
        indices.stride(0),
        library.threads(),
    )
    return key_copies, value_copies


def limit(scores: Tensor, *_: object, **__: object) -> str | None:
    """Return why ``top_columns`` cannot serve these arguments, or None."""
    if scores.shape[1] > MOST_COLUMNS:
        return f"more than {MOST_COLUMNS} columns"
    return None if scores.shape[1] else "no columns"


def top_columns(
    scores: Tensor, budget: int, *, sink_tokens: int, recent_window: int, first_valid: Tensor | None
) -> Tensor:
    """Select columns with the compiled radix search."""
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
