"""Define the memory layout of a layer's key codes."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class KeyCodes(NamedTuple):
    """Hold the bounds and codes of a layer's keys.

    low, high ``[Hkv, P, D]``: bounds of each page. codes uint8 ``[Hkv, P, page, D * bits / 8]``: byte j holds the
    channels j, j + width, j + 2 width, ..., the first in the lowest bits. Codes after the last column are undefined.
    columns: number of coded keys.
    """

    low: Tensor
    high: Tensor
    codes: Tensor
    bits: int
    columns: int
