"""Copy pairs with the compiled C kernel: one call for all heads, keys and values."""

from __future__ import annotations

from ctypes import c_int64, c_void_p

import torch
from torch import Tensor

from loopserve.kernels.native import library
from loopserve.kernels.native.arrays import address, rows_of


def gather_kv(keys: Tensor, values: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """See the package."""
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
