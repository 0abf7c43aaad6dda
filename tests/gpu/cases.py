"""Inputs on the GPU: heads of a later turn, lines that look like chosen ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Turn:
    """New queries ``[Hq, Tq, D]`` over stored keys and values ``[Hkv, Tk, D]``, and lines bool ``[Hq, Tk]``."""

    queries: Tensor
    keys: Tensor
    values: Tensor
    verticals: Tensor
    slashes: Tensor

    @property
    def scaling(self) -> float:
        return float(self.queries.shape[2] ** -0.5)


def turn(
    rows: int,
    total: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    channels: int = 128,
    group: int = 4,
    kv_heads: int = 2,
) -> Turn:
    """Random numbers; lines are sinks, a band, single slashes and 2 % of the columns. The same for the same shape."""
    generator = torch.Generator("cuda").manual_seed(rows * total)

    def numbers(heads: int, length: int) -> Tensor:
        return torch.randn(heads, length, channels, generator=generator, device="cuda").to(dtype)

    heads = kv_heads * group
    verticals = torch.rand(heads, total, generator=generator, device="cuda") < 0.02
    slashes = torch.rand(heads, total, generator=generator, device="cuda") < 0.002
    verticals[:, :4] = True
    slashes[:, : min(200, total)] = True
    return Turn(numbers(heads, rows), numbers(kv_heads, total), numbers(kv_heads, total), verticals, slashes)
