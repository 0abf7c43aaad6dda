"""Multiply few rows with a weight matrix."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from loopserve.kernels import backend
from loopserve.kernels.native import linear as native

_OPERATION = backend.operation("linear", cpu="native.linear", limits={"cpu": native.limit})


def linear(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return ``inputs @ weight.T + bias``: ``[..., out]`` for rows ``[..., in]``, weights ``[out, in]`` and biases ``[out]``.

    Where the compiled product serves (``native.limit``), a row's result does not depend on the others, bit by bit.
    Raises ValueError for arguments that do not fit together.
    """
    if weight.dim() != 2 or inputs.shape[-1:] != weight.shape[1:]:
        raise ValueError(
            f"linear: rows {list(inputs.shape)} and weights {list(weight.shape)} must be [..., in] and [out, in]"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"linear: biases {list(bias.shape)} must be [{weight.shape[0]}]")
    for name, each in (("weights", weight), ("biases", bias)):
        if each is not None and (each.dtype is not inputs.dtype or each.device != inputs.device):
            raise ValueError(
                f"linear: rows are {inputs.dtype} on {inputs.device}, {name} {each.dtype} on {each.device}"
            )
    found: Tensor = _OPERATION(inputs, weight, bias)
    return found


def linear_reference(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Multiply by torch."""
    return functional.linear(inputs, weight, bias)
