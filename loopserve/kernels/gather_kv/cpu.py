"""The copy by the compiled kernel: one call for all heads, keys and values."""

from __future__ import annotations

from ctypes import c_int64, c_void_p

from torch import Tensor

from loopserve.kernels.native import library
from loopserve.kernels.native.arrays import rows_of


def gather_kv(keys: Tensor, values: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """See the package."""
    keys, values, indices = rows_of(keys), rows_of(values), rows_of(indices)
    heads, chosen = indices.shape
    key_copies = keys.new_empty(heads, chosen, keys.shape[2])
    value_copies = values.new_empty(heads, chosen, values.shape[2])
    size = keys.element_size()
    library.function("gather_kv", *[c_void_p] * 5, *[c_int64] * 10)(
        keys.data_ptr(),
        values.data_ptr(),
        indices.data_ptr(),
        key_copies.data_ptr(),
        value_copies.data_ptr(),
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
