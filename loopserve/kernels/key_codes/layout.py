"""How the codes of a layer's keys lie in memory."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class KeyCodes(NamedTuple):
    """low, high ``[Hkv, P, D]``: bounds of each page. codes uint8 ``[Hkv, P, page, D * bits / 8]``, those behind the last column mean
    nothing: byte j holds the channels j, j + width, j + 2 width, ..., the first in the lowest bits. columns: keys coded.
    """

    low: Tensor
    high: Tensor
    codes: Tensor
    bits: int
    columns: int
