"""Tensors as C sees them."""

from __future__ import annotations

from torch import Tensor


def rows_of(tensor: Tensor) -> Tensor:
    """The tensor itself if the numbers of its last dimension lie side by side, else a copy in which they do."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
