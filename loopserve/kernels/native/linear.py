"""Call the compiled product of few rows with bfloat16 weights."""

from __future__ import annotations

from collections.abc import Callable
from ctypes import c_int64, c_void_p
from functools import cache

import torch
from torch import Tensor

from loopserve.kernels.native import library
from loopserve.kernels.native.library import address, optional

MOST_ROWS = 8  # beyond, a product is bound by arithmetic, and torch's blocks are faster
LEAST_OUTPUTS = 16  # those of a tile


@cache
def _product() -> Callable[..., None]:
    return library.function("linear", *[c_void_p] * 4, *[c_int64] * 4)


def limit(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
    """Return why the compiled product does not serve these arguments, or None."""
    if inputs.dtype is not torch.bfloat16:
        return "torch reads float32 as fast"
    outputs, size = weight.shape
    if not 0 < inputs.numel() <= MOST_ROWS * size:
        return f"no rows, or more than {MOST_ROWS}"
    if outputs < LEAST_OUTPUTS:
        return f"less than {LEAST_OUTPUTS} outputs"
    return None if weight.is_contiguous() and (bias is None or bias.is_contiguous()) else "strided weights"


def linear(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Multiply rows, reading the weights once. The operation has checked shapes, dtypes and devices."""
    inputs = inputs.contiguous()
    (outputs, size), shape, kind = weight.shape, inputs.shape, torch.bfloat16
    output = inputs.new_empty(*shape[:-1], outputs)
    _product()(
        address("inputs", inputs, kind, shape),
        address("weight", weight, kind, weight.shape),
        optional("bias", bias, kind, (outputs,)),
        address("output", output, kind, output.shape),
        inputs.numel() // size,
        size,
        outputs,
        library.threads(),
    )
    return output
