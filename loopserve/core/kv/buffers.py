"""Hold the keys and values of one layer in a buffer that grows. Define what any other store of them must answer."""

from __future__ import annotations

from operator import attrgetter
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from loopserve.core.kv.key_summaries import KeySummaries
from loopserve.kernels.gather_kv import gather_kv
from loopserve.kernels.native.library import large_pages
from loopserve.kernels.paged import Rows

ACTIVE_SLACK = 64  # spare columns for outputs behind a gathered selection before the buffer must grow


_VERSION = attrgetter("_version")


def versions(*tensors: Tensor) -> tuple[int, ...]:
    """Return the write counters of tensors, which views share. Return () for tensors made in inference mode, which have none."""
    try:
        return tuple(map(_VERSION, tensors))
    except RuntimeError:
        return ()


class Known(NamedTuple):
    """Hold copies of pairs: keys and values ``[Hkv, S, D]`` of columns int64 ``[Hkv, S]``, rising in each head."""

    columns: Tensor
    keys: Tensor
    values: Tensor


class PairStore(Protocol):
    """Declare what a layer's cache asks of its store. Another engine's store (``core.engine.hosted``) implements it as well."""

    length: int  # columns

    @property
    def in_place(self) -> bool:
        """Return whether ``keys`` and ``values`` are the stored tensors. Otherwise each access gathers them."""

    @property
    def rows(self) -> tuple[Rows, Rows] | None:
        """Return all keys and values where kernels may read them, in blocks as well; None where they have to be gathered."""

    @property
    def heads(self) -> int: ...

    @property
    def pair_bytes(self) -> int:
        """Return the bytes of one head's key and value."""

    @property
    def pairs(self) -> int:
        """Return the pairs held, summed over the heads."""

    @property
    def nbytes(self) -> int: ...

    @property
    def allocated_nbytes(self) -> int: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def intact(self) -> bool:
        """Return whether only the store's owner has written into it."""

    @property
    def keys(self) -> Tensor:
        """Return all keys ``[Hkv, length, D]``."""

    @property
    def values(self) -> Tensor:
        """Return all values ``[Hkv, length, D]``."""

    def gather(self, columns: Tensor, known: Known | None = None) -> tuple[Tensor, Tensor]:
        """Return copies of the pairs at columns int64 ``[Hkv, S]``: keys and values ``[Hkv, S, D]``.

        known: pairs that are at hand, so that a store whose pairs lie scattered need not read them again.
        """

    def since(self, column: int) -> tuple[Tensor, Tensor]:
        """Return the keys and values of all columns from ``column`` on."""

    def summarise(self, summaries: KeySummaries) -> None:
        """Bring summaries of the keys up to date."""

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Take in the pairs ``[Hkv, T, D]`` of the next T columns."""

    def reserve(self, length: int) -> None:
        """Provide capacity for ``length`` pairs now."""

    def copy(self) -> PairStore:
        """Return an independent copy."""


class PairBuffer:
    """Hold keys and values ``[Hkv, capacity, D]``. Capacity grows by half, so that appending one token rarely copies the buffer."""

    def __init__(self, keys: Tensor, values: Tensor, slack: int) -> None:
        """Start from existing pairs ``[Hkv, T, D]`` with capacity for ``slack`` more."""
        self.length = 0
        self.heads = heads = keys.shape[0]
        self.dtype, self.device = keys.dtype, keys.device
        self.pair_bytes = keys.shape[2] * keys.element_size() + values.shape[2] * values.element_size()  # of one head
        tokens = keys.shape[1]
        self._keys = large_pages(keys.new_empty(heads, tokens + slack, keys.shape[2]))
        self._values = large_pages(values.new_empty(heads, tokens + slack, values.shape[2]))
        self._rows = self._keys, self._values  # views of the pairs held, made again whenever there are more or fewer
        self.append(keys, values)

    def append(self, keys: Tensor, values: Tensor) -> None:
        start, tokens = self.length, keys.shape[1]
        self.reserve(start + tokens)
        self._keys.narrow(1, start, tokens).copy_(keys)
        self._values.narrow(1, start, tokens).copy_(values)
        self.length = start + tokens
        self._versions = versions(self._keys, self._values)

    @property
    def in_place(self) -> bool:
        return True

    @property
    def rows(self) -> tuple[Tensor, Tensor]:
        if self._rows[0].shape[1] != self.length:
            self._rows = self._keys[:, : self.length], self._values[:, : self.length]
        return self._rows

    def gather(self, columns: Tensor, known: Known | None = None) -> tuple[Tensor, Tensor]:
        return gather_kv(self.keys, self.values, columns)

    def since(self, column: int) -> tuple[Tensor, Tensor]:
        return self.keys[:, column:], self.values[:, column:]

    def summarise(self, summaries: KeySummaries) -> None:
        summaries.update(self.keys)

    def reserve(self, length: int) -> None:
        """Provide capacity for ``length`` pairs now, so that no later append has to."""
        if length > self._keys.shape[1]:
            self._grow(max(length, self._keys.shape[1] * 3 // 2))

    def _grow(self, capacity: int) -> None:
        for name in ("_keys", "_values"):
            old: Tensor = getattr(self, name)
            new = large_pages(old.new_empty(old.shape[0], capacity, old.shape[2]))
            new[:, : self.length] = old[:, : self.length]
            setattr(self, name, new)
        self._rows = self._keys, self._values
        self._versions = versions(self._keys, self._values)

    @property
    def intact(self) -> bool:
        """Return whether only this buffer has written into its tensors."""
        return versions(self._keys, self._values) == self._versions

    @property
    def keys(self) -> Tensor:
        return self.rows[0]

    @property
    def values(self) -> Tensor:
        return self.rows[1]

    @property
    def pairs(self) -> int:
        """Return the pairs held, summed over the heads."""
        return self.heads * self.length

    @property
    def nbytes(self) -> int:
        """Return the bytes of the pairs held, without unused capacity."""
        return self.pairs * self.pair_bytes

    @property
    def allocated_nbytes(self) -> int:
        """Return the bytes allocated, unused capacity included."""
        return sum(buffer.untyped_storage().nbytes() for buffer in (self._keys, self._values))

    def copy(self) -> PairBuffer:
        return PairBuffer(self.keys, self.values, slack=ACTIVE_SLACK)
