"""Pairs of heads that keep different numbers, held without padding; what attention reads is padded when asked for.

Padding for one layer lives for one call; the store of every layer at rest holds exactly what its heads keep.
"""

from __future__ import annotations

import torch
from torch import Tensor

from loopserve.core.kv.buffers import PairBuffer


class RaggedBuffer:
    """Survivors of an eviction, head behind head ``[sum, D]``, then every pair since, as ``PairBuffer`` offers them."""

    def __init__(self, keys: Tensor, values: Tensor, first_valid: Tensor, tail: PairBuffer) -> None:
        """keys, values ``[Hkv, S, D]``, left-padded up to ``first_valid`` ``[Hkv]``; tail: the pairs behind them."""
        self._held = torch.arange(keys.shape[1], device=keys.device) >= first_valid[:, None]
        self._keys, self._values = keys[self._held], values[self._held]
        self._tail = tail

    def append(self, keys: Tensor, values: Tensor) -> None:
        self._tail.append(keys, values)

    def reserve(self, tokens: int) -> None:
        """Make room for ``tokens`` columns in all."""
        self._tail.reserve(max(tokens - self._held.shape[1], 0))

    @property
    def length(self) -> int:
        """Columns, filler of the shorter heads included."""
        return self._held.shape[1] + self._tail.length

    @length.setter
    def length(self, value: int) -> None:
        self._tail.length = value - self._held.shape[1]

    @property
    def keys(self) -> Tensor:
        return self._padded(self._keys, self._tail.keys)

    @property
    def values(self) -> Tensor:
        return self._padded(self._values, self._tail.values)

    def _padded(self, held: Tensor, tail: Tensor) -> Tensor:
        """``[Hkv, columns, D]``, zeros where a head holds nothing."""
        heads, width = self._held.shape
        whole = held.new_zeros(heads, width + tail.shape[1], held.shape[1])
        whole[:, :width][self._held] = held
        whole[:, width:] = tail
        return whole

    @property
    def intact(self) -> bool:
        """Nobody but this buffer has written into it; what it hands out of the survivors is a copy."""
        return self._tail.intact

    @property
    def dtype(self) -> torch.dtype:
        return self._keys.dtype

    @property
    def device(self) -> torch.device:
        return self._keys.device

    @property
    def heads(self) -> int:
        return len(self._held)

    @property
    def pair_bytes(self) -> int:
        """Bytes of one head's key and value."""
        return self._tail.pair_bytes

    @property
    def pairs(self) -> int:
        """Pairs held, summed over the heads."""
        return len(self._keys) + self._tail.pairs

    @property
    def nbytes(self) -> int:
        """Bytes of the pairs held; padding is not."""
        return self.pairs * self.pair_bytes

    @property
    def allocated_nbytes(self) -> int:
        """Bytes really taken from the machine, unused room included."""
        held = sum(part.untyped_storage().nbytes() for part in (self._keys, self._values))
        return held + self._tail.allocated_nbytes

    def copy(self) -> RaggedBuffer:
        other = RaggedBuffer.__new__(RaggedBuffer)
        other._held, other._keys, other._values = self._held, self._keys, self._values  # never written in place
        other._tail = self._tail.copy()
        return other
