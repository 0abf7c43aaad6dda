"""Launch kernels, and choose tile shapes for the device.

Every kernel is launched by ``launch``, so that a test can record and compile it.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from loopserve.kernels.paged import Paged, Rows

_INTERPRETED_PROCESSORS = 3  # small and odd, so that interpreted tests cover persistent loops and split rows


class Tile(NamedTuple):
    """Describe one step of attention: query rows by keys, warps and pipeline stages."""

    rows: int
    keys: int
    warps: int
    stages: int


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Launch a kernel on the device of its first tensor."""
    device = next(each.device for each in args if isinstance(each, Tensor))
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        _start(kernel, grid, args, options)


def _start(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], options: dict[str, Any]) -> None:
    kernel[grid](*args, **options)


@cache
def processors(device: torch.device) -> int:
    """Return the number of streaming multiprocessors of a device."""
    if device.type != "cuda":
        return _INTERPRETED_PROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@cache
def generation(device: torch.device) -> int:
    """Return the major compute capability: 8 Ampere and Ada, 9 Hopper, 10 and more Blackwell."""
    return int(torch.cuda.get_device_capability(device)[0]) if device.type == "cuda" else 9


def padded(channels: int) -> int:
    """Return the channels of a tile: the next power of two, at least the minimum of a matrix instruction."""
    return max(16, 1 << (channels - 1).bit_length())


def attention_tile(queries: Tensor, value_channels: int) -> Tile:
    """Return the tile for many rows.

    Tiles have 64 rows where possible: an isolated slash costs rows + 1 keys per tile, and ``select_lines`` computes
    costs for 64.
    """
    width = max(padded(queries.shape[2]), padded(value_channels))
    if queries.element_size() == 4:  # three products per product need many registers
        return Tile(32, 32, 4, 2)
    hopper = generation(queries.device) >= 9
    if width <= 64:
        return Tile(64, 64, 4, 4 if hopper else 3)
    return Tile(64, 64, 4, 3 if hopper else 2) if width <= 128 else Tile(64, 32, 8, 2)


def tile_options(queries: Tensor, value_channels: int, shape: Tile, softcap: float | None) -> dict[str, Any]:
    """Return the options that every attention kernel has: channels, products, warps and stages."""
    channels = queries.shape[2]
    return {
        "CHANNELS": channels,
        "PADDED": padded(channels),
        "VALUE_CHANNELS": value_channels,
        "VALUE_PADDED": padded(value_channels),
        "SOFTCAP": bool(softcap),
        "PRECISION": precision(queries.dtype),
        "num_warps": shape.warps,
        "num_stages": shape.stages,
    }


def row_strides(*tensors: Tensor) -> tuple[int, ...]:
    """Return the strides of heads and of rows of each tensor ``[H, T, D]``."""
    return tuple(stride for each in tensors for stride in each.stride()[:2])


def precision(dtype: torch.dtype) -> str:
    """Return how float32 is multiplied: as three TensorFloat-32 products with the error of float32.

    Other dtypes ignore it.
    """
    return "tf32x3" if dtype == torch.float32 else "ieee"


def readable(tensor: Tensor) -> Tensor:
    """Return the tensor with a dense last dimension, as every kernel needs it; copy only if necessary."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


class InBlocks(NamedTuple):
    """Hold what a kernel needs beside the strides of rows for a store in blocks; of one in one piece None and 0."""

    table: Tensor | None
    key_stride: int | None  # from block to block
    value_stride: int | None
    size: int


class Located(NamedTuple):
    """Hold the first numbers of keys and values, the strides of their heads and rows, and the blocks they lie in."""

    store: tuple[Tensor, Tensor]
    strides: tuple[int, ...]
    in_blocks: InBlocks


def located(keys: Rows, values: Rows) -> Located:
    """Return where a kernel finds keys and values. Those in blocks must have a dense last dimension."""
    if isinstance(keys, Paged) and isinstance(values, Paged):
        held = keys.blocks, values.blocks
        strides = tuple(stride for each in held for stride in (each.stride(0), each.stride(2)))
        return Located(held, strides, InBlocks(keys.table, held[0].stride(1), held[1].stride(1), keys.size))
    assert isinstance(keys, Tensor) and isinstance(values, Tensor)
    held = readable(keys), readable(values)
    return Located(held, row_strides(*held), InBlocks(None, None, None, 0))


LOG2E = 1.4426950408889634


def score_factors(scaling: float, softcap: float | None) -> tuple[float, float]:
    """Return (inner, outer): base-2 scores are ``inner * product``, or ``outer * tanh(inner * product)`` with a
    softcap.
    """
    return (scaling / softcap, softcap * LOG2E) if softcap else (scaling * LOG2E, 1.0)
