"""Hold pairs of heads that keep different numbers without padding. Attention reads a padded copy.

The padded copy of a layer exists during one call. The stores of all other layers hold exactly the pairs of their heads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from loopserve.core.kv.buffers import Known, PairBuffer
from loopserve.core.kv.key_summaries import KeySummaries
from loopserve.kernels.gather_kv import gather_kv


class RaggedBuffer:
    """Hold the survivors of an eviction, head after head ``[sum, D]``, then every later pair, with the interface of ``PairBuffer``."""

    def __init__(self, keys: Tensor, values: Tensor, first_valid: Tensor, tail: PairBuffer) -> None:
        """Start from keys and values ``[Hkv, S, D]``, left-padded up to ``first_valid`` ``[Hkv]``. tail: the pairs behind them."""
        self._held = torch.arange(keys.shape[1], device=keys.device) >= first_valid[:, None]
        self._keys, self._values = keys[self._held], values[self._held]
        self._tail = tail

    def append(self, keys: Tensor, values: Tensor) -> None:
        self._tail.append(keys, values)

    @property
    def in_place(self) -> bool:
        return True

    @property
    def rows(self) -> tuple[Tensor, Tensor]:
        return self.keys, self.values

    def gather(self, columns: Tensor, known: Known | None = None) -> tuple[Tensor, Tensor]:
        return gather_kv(self.keys, self.values, columns)

    def since(self, column: int) -> tuple[Tensor, Tensor]:
        width = self._held.shape[1]
        if column < width:
            return self.keys[:, column:], self.values[:, column:]
        return self._tail.since(column - width)

    def summarise(self, summaries: KeySummaries) -> None:
        summaries.update(self.keys)

    def reserve(self, tokens: int) -> None:
        """Provide capacity for ``tokens`` columns in all."""
        self._tail.reserve(max(tokens - self._held.shape[1], 0))

    @property
    def length(self) -> int:
        """Return the columns, filler of the shorter heads included."""
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
        """Return ``[Hkv, columns, D]``, zeros where a head holds nothing."""
        heads, width = self._held.shape
        whole = held.new_zeros(heads, width + tail.shape[1], held.shape[1])
        whole[:, :width][self._held] = held
        whole[:, width:] = tail
        return whole

    @property
    def intact(self) -> bool:
        """Return whether only this buffer has written into its tensors. The survivors are returned as copies."""
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
        """Return the bytes of one head's key and value."""
        return self._tail.pair_bytes

    @property
    def pairs(self) -> int:
        """Return the pairs held, summed over the heads."""
        return len(self._keys) + self._tail.pairs

    @property
    def nbytes(self) -> int:
        """Return the bytes of the pairs held, without padding."""
        return self.pairs * self.pair_bytes

    @property
    def allocated_nbytes(self) -> int:
        """Return the bytes allocated, unused capacity included."""
        held = sum(part.untyped_storage().nbytes() for part in (self._keys, self._values))
        return held + self._tail.allocated_nbytes

    def copy(self) -> RaggedBuffer:
        other = RaggedBuffer.__new__(RaggedBuffer)
        other._held, other._keys, other._values = self._held, self._keys, self._values  # never written in place
        other._tail = self._tail.copy()
        return other
