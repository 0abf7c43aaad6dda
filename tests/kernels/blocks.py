"""Stores whose pairs lie in the blocks of a paged cache, in the layouts that engines use."""

from __future__ import annotations

import torch
from torch import Tensor

from loopserve.kernels.paged import Paged

LAYOUTS = ("NHD", "HND", "packed")


def in_blocks(keys: Tensor, values: Tensor, size: int, layout: str, generator: torch.Generator) -> tuple[Paged, Paged]:
    """Keys ``[Hkv, n, D]`` and values ``[Hkv, n, Dv]`` in shuffled blocks of a larger cache, which is NaN elsewhere."""
    heads, total, _ = keys.shape
    blocks = -(-total // size)
    table = torch.randperm(blocks + 3, generator=generator)[:blocks]
    whole = _cache(layout, blocks + 3, heads, size, keys.shape[2], values.shape[2], keys.dtype)
    columns = torch.arange(total)
    for part, rows in zip(whole, (keys, values), strict=True):
        part[:, table[columns // size], columns % size] = rows
    spare = torch.full((2,), -1)  # an engine's row of the table is as long as its longest request
    table = torch.cat([table, spare])
    return Paged(whole[0], table, total), Paged(whole[1], table, total)


def _cache(
    layout: str, blocks: int, heads: int, size: int, dim: int, value_dim: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Views ``[Hkv, blocks, size, D]`` of the keys and values of a cache."""
    if layout == "packed":
        cache = torch.full((blocks, heads, size, dim + value_dim), float("nan"), dtype=dtype).transpose(0, 1)
        return cache[..., :dim], cache[..., dim:]
    found = []
    for width in (dim, value_dim):
        if layout == "NHD":
            found.append(torch.full((blocks, size, heads, width), float("nan"), dtype=dtype).permute(2, 0, 1, 3))
        else:
            found.append(torch.full((blocks, heads, size, width), float("nan"), dtype=dtype).transpose(0, 1))
    return found[0], found[1]
