"""Define the result of a decode policy: the pairs that decoding attends to in one layer, and the retention of the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from operator import attrgetter

import torch
from torch import Tensor

from loopserve.core.errors import PolicyError


class Retention(StrEnum):
    KEEP = "keep"  # the others stay in the store and can be selected again
    EVICT = "evict"  # the others are removed and their bytes freed


@dataclass(frozen=True, eq=False)
class KVSelection:
    """Hold the pairs that decoding attends to in one layer.

    indices int64 ``[Hkv, S]``: original positions, sorted and unique per head, left-padded with -1 where a head keeps fewer.
    lengths int64 ``[Hkv]``: number of pairs of each head. boundary: every pair at or after this position is attended as well.
    fleeting: the selection will be replaced soon, so its pairs are attended in place in the store instead of being gathered.
    """

    indices: Tensor
    lengths: Tensor
    boundary: int
    retention: Retention = Retention.KEEP
    fleeting: bool = False

    @classmethod
    def from_heads(cls, heads: Sequence[Tensor], boundary: int, retention: Retention = Retention.KEEP) -> KVSelection:
        """Build from one sorted index tensor per KV head; lengths may differ."""
        lengths = torch.tensor([len(head) for head in heads], dtype=torch.long, device="cpu")
        indices = torch.full((len(heads), int(lengths.max())), -1, dtype=torch.long, device="cpu")
        for row, head in zip(indices, heads, strict=True):
            if len(head):
                row[-len(head) :] = head
        device = heads[0].device
        return cls(indices.to(device), lengths.to(device), boundary, retention)

    @classmethod
    def uniform(
        cls, indices: Tensor, boundary: int, retention: Retention = Retention.KEEP, *, fleeting: bool = False
    ) -> KVSelection:
        """Build from ``[Hkv, S]`` when every head keeps the same number."""
        lengths = torch.full((indices.shape[0],), indices.shape[1], dtype=torch.long, device=indices.device)
        return cls(indices, lengths, boundary, retention, fleeting)

    @classmethod
    def counted(cls, indices: Tensor, counts: Sequence[int], boundary: int) -> KVSelection:
        """Build one that lasts for a step from ``[Hkv, S]`` and the number of pairs of each head."""
        lengths = torch.tensor(counts, dtype=torch.long, device=indices.device)
        made = cls(indices, lengths, boundary, fleeting=True)
        # Known without reading the tensors, which is slow for so few numbers.
        made.__dict__["pairs"] = sum(counts)
        made.__dict__["ragged"] = min(counts, default=0) != indices.shape[1]
        return made

    @cached_property
    def pairs(self) -> int:
        """Return the pairs selected, summed over the heads."""
        return int(self.lengths.sum())

    @cached_property
    def ragged(self) -> bool:
        return bool((self.lengths != self.indices.shape[1]).any())

    def attended_positions(self, length: int) -> Tensor:
        """Return the positions below ``length`` that are selected or lie in the tail: bool ``[Hkv, length]``."""
        mask = torch.zeros(self.indices.shape[0], length + 1, dtype=torch.bool, device=self.indices.device)
        mask.scatter_(1, self.indices + 1, True)  # fillers are -1 and go to the extra column
        mask = mask[:, 1:]
        mask[:, self.boundary :] = True
        return mask

    def head(self, head: int) -> Tensor:
        """Return the sorted original positions that one KV head keeps."""
        return self.indices[head, self.indices.shape[1] - int(self.lengths[head]) :]

    def check_form(self, kv_heads: int, length: int) -> None:
        """Raise PolicyError unless shapes, types and boundary are right. The numbers themselves are not checked."""
        if self.indices.dtype != torch.long or self.indices.dim() != 2 or self.indices.shape[0] != kv_heads:
            raise PolicyError(
                f"KVSelection.indices: expected int64 [{kv_heads}, S], got {self.indices.dtype} {list(self.indices.shape)}"
            )
        if not 0 <= self.boundary <= length:
            raise PolicyError(f"KVSelection.boundary: {self.boundary} is outside the {length} tokens seen")
        if self.lengths.dtype != torch.long or self.lengths.shape != (kv_heads,):
            raise PolicyError(
                f"KVSelection.lengths: expected int64 [{kv_heads}], got {self.lengths.dtype} {list(self.lengths.shape)}"
            )

    def check(self, kv_heads: int, length: int) -> None:
        """Raise PolicyError unless indices are sorted, unique, in range and below the boundary, and filler is -1.

        The numbers are read once, unless somebody writes into them.
        """
        self.check_form(kv_heads, length)
        versions = _versions(self.indices, self.lengths)
        if versions is not None and versions in self._checked:
            return
        for known in ("pairs", "ragged"):  # of numbers that may have been written since
            self.__dict__.pop(known, None)
        self._check_numbers(kv_heads)
        self._checked[:] = [versions]

    @cached_property
    def _checked(self) -> list[tuple[int, ...] | None]:
        """Hold the tensors and their write counters when the numbers were last found right."""
        return []

    def _check_numbers(self, kv_heads: int) -> None:
        if bool((self.lengths < 0).any() | (self.lengths > self.indices.shape[1]).any()):
            raise PolicyError(f"KVSelection.lengths: expected {kv_heads} numbers from 0 to {self.indices.shape[1]}")
        width = self.indices.shape[1]
        if (
            not self.ragged and width and _rises_within(self.indices, self.boundary)
        ):  # the common case, in few operations
            return
        filler = torch.arange(width, device=self.indices.device) < (width - self.lengths)[:, None]
        if bool((self.indices.masked_fill(~filler, -1) != -1).any()):
            raise PolicyError("KVSelection.indices: heads that keep fewer are padded with -1 on the left")
        kept = self.indices.masked_fill(filler, 0)
        if bool(((kept < 0) | (kept >= max(self.boundary, 1))).any() & (width > 0)):
            raise PolicyError(f"KVSelection.indices: positions must lie in [0, {self.boundary})")
        steps = (self.indices[:, 1:] <= self.indices[:, :-1]) & ~filler[:, :-1]
        if bool(steps.any()):
            raise PolicyError("KVSelection.indices: positions must be sorted and unique per head")


def _rises_within(indices: Tensor, boundary: int) -> bool:
    """Return whether each row rises strictly from at least 0 to below ``boundary``."""
    ends = bool((indices[:, 0] >= 0).all() & (indices[:, -1] < boundary).all())
    return ends and bool((indices[:, 1:] > indices[:, :-1]).all())


def _versions(*tensors: Tensor) -> tuple[int, ...] | None:
    """Return tensors' identities and write counters, or None where one was made in inference mode and has no counter."""
    try:
        return (*map(id, tensors), *map(attrgetter("_version"), tensors))
    except RuntimeError:
        return None
