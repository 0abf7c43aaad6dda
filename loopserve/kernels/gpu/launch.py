"""The one door to the device: every kernel is started here, so a test can see (and compile) what would be started.

Also what a launch is shaped by: how many processors the device has, and which tile suits its memory.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

_INTERPRETED_PROCESSORS = 3  # few and odd: the interpreter then walks persistent loops and splits rows


class Tile(NamedTuple):
    """The shape of one step of attention: rows of queries by keys, and how the compiler spreads and pipelines it."""

    rows: int
    keys: int
    warps: int
    stages: int


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Start a kernel on the device of its first tensor."""
    device = next(each.device for each in args if isinstance(each, Tensor))
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        _start(kernel, grid, args, options)


def _start(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], options: dict[str, Any]) -> None:
    kernel[grid](*args, **options)


@cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors of a device."""
    if device.type != "cuda":
        return _INTERPRETED_PROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@cache
def generation(device: torch.device) -> int:
    """Major compute capability: 8 Ampere and Ada, 9 Hopper, 10 and more Blackwell."""
    return int(torch.cuda.get_device_capability(device)[0]) if device.type == "cuda" else 9


def padded(channels: int) -> int:
    """Channels of a tile: the next power of two, at least what a matrix instruction takes."""
    return max(16, 1 << (channels - 1).bit_length())


def attention_tile(queries: Tensor, value_channels: int) -> Tile:
    """The tile for many rows. Rows stay at 64: isolated slashes cost rows + 1 keys per tile, and ``select_lines``
    counts in 64.
    """
    width = max(padded(queries.shape[2]), padded(value_channels))
    if queries.element_size() == 4:  # three products for one take many registers
        return Tile(32, 32, 4, 2)
    hopper = generation(queries.device) >= 9
    if width <= 64:
        return Tile(64, 64, 4, 4 if hopper else 3)
    return Tile(64, 64, 4, 3 if hopper else 2) if width <= 128 else Tile(64, 32, 8, 2)


def precision(dtype: torch.dtype) -> str:
    """How float32 is multiplied: in three TensorFloat-32 products, whose error is that of float32. Others ignore it."""
    return "tf32x3" if dtype == torch.float32 else "ieee"


def readable(tensor: Tensor) -> Tensor:
    """The tensor with its last dimension dense, as every kernel reads it; a copy only if it is not."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


LOG2E = 1.4426950408889634


def score_factors(scaling: float, softcap: float | None) -> tuple[float, float]:
    """(inner, outer): base-2 scores are ``inner * product``, or ``outer * tanh(inner * product)`` under a softcap."""
    return (scaling / softcap, softcap * LOG2E) if softcap else (scaling * LOG2E, 1.0)
