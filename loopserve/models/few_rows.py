"""Multiply the few rows of a decode step with bfloat16 weights as fast as a CPU's memory gives them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from loopserve.kernels.linear import linear
from loopserve.kernels.native.linear import MOST_ROWS

_PLAIN = (torch.nn.Parameter, Tensor)


class FewRowsLinear(torch.nn.Linear):
    """Compute a linear layer: few rows by loopserve's kernel, many rows by torch."""

    def forward(self, input: Tensor) -> Tensor:
        """Return ``[..., out]`` for ``[..., in]``."""
        weight, bias = self.weight, self.bias
        if input.numel() > MOST_ROWS * self.in_features or _needs_torch(input, weight):
            return functional.linear(input, weight, bias)
        return linear(input, weight, bias)


def _needs_torch(input: Tensor, weight: Tensor) -> bool:
    """Return whether a product is differentiated, traced, compiled or cast, or is not one of plain bfloat16 tensors on a CPU."""
    if type(input) is not Tensor or type(weight) not in _PLAIN:
        return True
    if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]  # of torch
        return True
    if input.dtype is not torch.bfloat16 or weight.dtype is not torch.bfloat16 or not (input.is_cpu and weight.is_cpu):
        return True
    return torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling()


def serve_few_rows(model: PreTrainedModel) -> None:
    """Let the plain bfloat16 linear layers of a model multiply few rows on a CPU by loopserve's kernel. Weights and names stay."""
    for module in model.modules():
        plain = (
            type(module) is torch.nn.Linear and type(module.weight) in _PLAIN
        )  # quantised weights keep the type of the layer
        if plain and module.weight.dtype is torch.bfloat16:
            module.__class__ = FewRowsLinear
