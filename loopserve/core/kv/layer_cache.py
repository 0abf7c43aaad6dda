"""Cache the KV pairs of one layer: a store of every pair and, while decoding, the active set gathered from it.

Keys arrive rotated to their position in the conversation and are never re-indexed. Depends on no policy and no model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from loopserve.core.errors import CacheError, Fault, PolicyFault
from loopserve.core.kv.buffers import ACTIVE_SLACK, Known, PairBuffer, PairStore
from loopserve.core.kv.ragged import RaggedBuffer
from loopserve.core.kv.selection import KVSelection, Retention

FIRST_CAPACITY = 256


class Counted:
    """Hold int64 0, 1, 2, ... in one tensor for all layers of a conversation, since every call needs a part of it.

    Conversations do not share it, so that a write into it cannot affect another conversation.
    """

    def __init__(self) -> None:
        self._known: Tensor | None = None

    def __call__(self, start: int, end: int, device: torch.device) -> Tensor:
        """Return ``start`` to ``end - 1`` as a read-only view."""
        known = self._known
        if known is None or known.shape[0] < end or known.device != device:
            self._known = known = torch.arange(max(end, 1024) * 3 // 2, device=device)
        return known[start:end]


def _survivors(keys: Tensor, values: Tensor, first_valid: Tensor | None, width: int) -> PairBuffer | RaggedBuffer:
    """Return the pairs that an eviction left, ``[Hkv, width or more, D]``, without the padding of heads that keep fewer."""
    if first_valid is None:
        return PairBuffer(keys, values, slack=ACTIVE_SLACK)
    tail = PairBuffer(keys[:, width:], values[:, width:], slack=ACTIVE_SLACK)
    return RaggedBuffer(keys[:, :width], values[:, :width], first_valid, tail)


def _said(tensor: Tensor | PairStore) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} on {tensor.device}"


@dataclass
class ActiveSet:
    """Hold the pairs that decoding attends to: a selection, and every pair from its boundary on.

    pairs: a gathered copy, or None if a fleeting selection is attended in place, at its columns of the store.
    """

    selection: KVSelection
    pairs: PairBuffer | None = None
    first_valid: Tensor | None = None  # int64 [Hkv]: filler columns of heads that keep fewer, in the copy

    def attended(self, seen: int) -> int:
        """Return the pairs attended by one query, summed over the KV heads, with ``seen`` tokens stored."""
        heads, width = self.selection.indices.shape
        selected = self.selection.pairs if self.selection.ragged else heads * width
        return heads * (seen - self.selection.boundary) + selected

    @property
    def nbytes(self) -> int:
        """Return the bytes of the copy."""
        return self.pairs.nbytes if self.pairs is not None else 0

    def copy(self) -> ActiveSet:
        return ActiveSet(self.selection, self.pairs.copy() if self.pairs is not None else None, self.first_valid)


class LayerCache:
    """Hold the store and the active set of one layer."""

    def __init__(self, counted: Counted | None = None) -> None:
        """Start an empty layer. counted: that of the conversation's other layers."""
        self.counted = counted or Counted()
        self.seen = 0  # logical length: tokens of the conversation, evicted ones included
        self.store: PairStore | None = None
        self.active: ActiveSet | None = None
        self.first_valid: Tensor | None = None
        self._reserved = 0
        self._positions: Tensor | None = None  # [Hkv, survivors] before the last boundary; None = nothing was evicted
        self._evicted_at = 0  # that boundary: every head holds every pair from it on

    @property
    def stored(self) -> int:
        """Return the columns of the store; fewer than ``seen`` after an eviction."""
        return self.store.length if self.store is not None else 0

    @property
    def store_bytes(self) -> int:
        """Return the bytes of the pairs stored."""
        return self.store.nbytes if self.store is not None else 0

    @property
    def allocated_bytes(self) -> int:
        """Return the bytes allocated by the store and the active set, unused capacity included."""
        store = self.store.allocated_nbytes if self.store is not None else 0
        active = self.active.pairs if self.active is not None else None
        return store + (active.allocated_nbytes if active is not None else 0)

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Add the pairs ``[Hkv, T, D]`` of the next T positions to the store and, if there is one, the active set."""
        if keys.dim() != 3 or keys.shape[:2] != values.shape[:2]:
            raise CacheError(
                f"append: keys {list(keys.shape)} and values {list(values.shape)} must both be [Hkv, T, D]"
            )
        held = keys if self.store is None else self.store
        if not keys.dtype == values.dtype == held.dtype or not keys.device == values.device == held.device:
            raise CacheError(
                f"the model computes keys in {_said(keys)} and values in {_said(values)}, the conversation holds "
                f"{_said(held)}: it must go on in the dtype and on the device it began with (was the model cast or moved, or "
                "does autocast differ?); start a new session otherwise"
            )
        tokens = keys.shape[1]
        if self.store is None:
            self.store = PairBuffer(keys, values, slack=max(FIRST_CAPACITY, self._reserved))
        else:
            if not self.store.intact:
                raise PolicyFault(
                    "somebody wrote into stored pairs between two passes: a policy, or other code, has kept a reference to "
                    "them; the conversation is computed anew from its tokens",
                    Fault.WROTE,
                    policy="unknown",
                    distribution="unknown",
                    moment="between two passes",
                )
            if self._reserved:
                self.store.reserve(self.store.length + tokens + self._reserved)
            self.store.append(keys, values)
        self._reserved = 0
        if self.active is not None and self.active.pairs is not None:
            self.active.pairs.append(keys, values)
        self.seen += tokens

    def reserve(self, tokens: int) -> None:
        """Provide, with the next append, capacity for ``tokens`` more pairs, so that decode steps need not copy the store."""
        self._reserved = tokens

    def positions(self) -> Tensor:
        """Return original positions: int64 ``[columns]``, or ``[Hkv, columns]`` once heads differ. Filler columns hold -1."""
        device = self.store.device if self.store is not None else torch.device("cpu")
        if self._positions is None:
            return self.counted(0, self.seen, device)
        tail = self.counted(self._evicted_at, self.seen, device).expand(self._positions.shape[0], -1)
        return torch.cat([self._positions, tail], dim=1)

    def attended(self) -> tuple[Tensor | None, int]:
        """Return the positions int64 ``[Hkv, S]`` that decoding attends to below a boundary, and that boundary.

        Filler is -1. None stands for every position; pairs from the boundary on are attended in any case.
        """
        if self.active is not None:
            return self.active.selection.indices, self.active.selection.boundary
        return self._positions, self._evicted_at

    def select(self, selection: KVSelection, *, checked: bool = False) -> None:
        """Make ``selection`` the active set, or evict all other pairs if its retention is EVICT.

        checked: its numbers come from a kernel of loopserve and need no check.
        """
        if self.store is None:
            raise CacheError("select: the layer holds no pairs yet")
        if not checked:
            selection.check(self.store.heads, self.seen)
        if selection.retention is Retention.EVICT:
            self._evict(selection)
            return
        whole = self._positions is None and self.first_valid is None
        if selection.fleeting and whole and self.store.rows is not None:
            self.active = ActiveSet(selection)
            return
        keys, values, first_valid = self._gather(selection)
        self.active = ActiveSet(selection, PairBuffer(keys, values, slack=ACTIVE_SLACK), first_valid)

    def release(self) -> None:
        """Drop the active set: the next call attends to the whole store."""
        self.active = None

    def _gather(self, selection: KVSelection) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the selected pairs and all pairs from the boundary on, per head, left-padded where heads keep fewer."""
        assert self.store is not None
        width = selection.indices.shape[1]
        columns = self._columns(selection)
        tail = self.stored - (self.seen - selection.boundary)
        keys, values = self.store.gather(columns, self._known())
        if tail < self.stored:
            last_keys, last_values = self.store.since(tail)
            keys = torch.cat([keys, last_keys], dim=1)
            values = torch.cat([values, last_values], dim=1)
        first_valid = width - selection.lengths if selection.ragged else None
        return keys, values, first_valid

    def _known(self) -> Known | None:
        """Return the pairs that the active set has copied: neighbouring selections have most of theirs in common."""
        if self.active is None or self.active.pairs is None or self.store is None or self.store.in_place:
            return None
        columns, pairs = self._columns(self.active.selection), self.active.pairs
        width = columns.shape[1]
        return Known(columns, pairs.keys[:, :width], pairs.values[:, :width])

    def _columns(self, selection: KVSelection) -> Tensor:
        """Return the store columns ``[Hkv, S]`` of a selection's positions. Filler entries point at column 0."""
        wanted = selection.indices.clamp(min=0)
        if self._positions is None:
            return wanted
        if selection.boundary < self._evicted_at:
            raise CacheError(
                f"select: boundary {selection.boundary} lies before that of the last eviction ({self._evicted_at}), "
                "where heads hold different pairs"
            )
        positions = self.positions()
        columns = torch.searchsorted(positions, wanted).clamp(max=positions.shape[1] - 1)
        filler = selection.indices < 0
        if bool(((positions.gather(1, columns) != wanted) & ~filler).any()):
            raise CacheError("select: a selected position was evicted earlier and cannot come back")
        return columns.masked_fill(filler, 0)

    def _evict(self, selection: KVSelection) -> None:
        keys, values, first_valid = self._gather(selection)
        self._positions = selection.indices.clone()  # a copy, since a policy may go on using its own tensor
        self._evicted_at = selection.boundary
        self.first_valid = first_valid
        self.store = _survivors(keys, values, first_valid, selection.indices.shape[1])
        self.active = None

    def truncate(self, length: int) -> None:
        """Remove every position from ``length`` on. Pairs evicted before stay evicted."""
        if not 0 <= length <= self.seen:
            raise CacheError(f"truncate: {length} is outside the {self.seen} tokens seen")
        self.active = None
        if length == self.seen:
            return
        if length < self._evicted_at:
            self._truncate_survivors(length)
        elif self.store is not None:
            self.store.length -= self.seen - length
        self.seen = length
        if length == 0:
            self.store = None

    def drop_last(self, tokens: int) -> None:
        """Remove the last ``tokens`` positions, added since any selection was made; the active set stays."""
        assert self.store is not None
        self.store.length -= tokens
        if self.active is not None and self.active.pairs is not None:
            self.active.pairs.length -= tokens
        self.seen -= tokens

    def _truncate_survivors(self, length: int) -> None:
        """Truncate into the part where heads hold different pairs: align them to the right again."""
        assert self.store is not None and self._positions is not None
        positions = self.positions()
        heads = [((row >= 0) & (row < length)).nonzero().flatten() for row in positions]
        kept = KVSelection.from_heads(heads, self.seen)  # columns replace positions here
        filler = kept.indices < 0
        keys, values = self.store.gather(kept.indices.clamp(min=0))
        first_valid = kept.indices.shape[1] - kept.lengths if kept.ragged else None
        self.store = _survivors(keys, values, first_valid, kept.indices.shape[1])
        self._positions = positions.gather(1, kept.indices.clamp(min=0)).masked_fill(filler, -1)
        self.first_valid = first_valid
        self._evicted_at = length

    def fork(self, counted: Counted | None = None) -> LayerCache:
        """Return an independent copy that shares no buffer. counted: that of the copy's other layers."""
        other = LayerCache(counted)
        other.seen, other._evicted_at = self.seen, self._evicted_at
        other.store = self.store.copy() if self.store is not None else None
        other.first_valid = self.first_valid  # never written in place, like positions and selections
        other._positions = self._positions
        other.active = self.active.copy() if self.active is not None else None
        return other


class SharedLayerCache(LayerCache):
    """Hold the active set of a layer that attends to the pairs of an earlier layer, its owner. Everything else is the owner's."""

    def __init__(self, owner: LayerCache) -> None:
        self.owner = owner
        self.active = None

    def __getattr__(self, name: str) -> Any:
        if name == "owner":  # while a copy is made
            raise AttributeError(name)
        return getattr(self.owner, name)

    @property
    def store_bytes(self) -> int:
        return 0

    @property
    def allocated_bytes(self) -> int:
        active = self.active.pairs if self.active is not None else None
        return active.allocated_nbytes if active is not None else 0

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Add the pairs that the owner has stored in this pass to the active set, if there is one."""
        if self.active is not None and self.active.pairs is not None:
            self.active.pairs.append(keys, values)

    def reserve(self, tokens: int) -> None:
        """Do nothing: the owner provides capacity."""

    def drop_last(self, tokens: int) -> None:
        """Remove the last ``tokens`` positions from the active set; the owner removes the pairs."""
        if self.active is not None and self.active.pairs is not None:
            self.active.pairs.length -= tokens

    def truncate(self, length: int) -> None:
        """Drop the active set; the owner truncates the pairs."""
        self.active = None

    def fork(self, counted: Counted | None = None) -> LayerCache:
        """Raise CacheError: a copy needs the copy of its owner, which ``KVCache.fork`` makes."""
        raise CacheError("fork: this layer attends to the pairs of another layer and is copied together with it")

    def fork_beside(self, owner: LayerCache) -> SharedLayerCache:
        """Return an independent copy over a copy of the owner."""
        other = SharedLayerCache(owner)
        other.active = self.active.copy() if self.active is not None else None
        return other

    def _evict(self, selection: KVSelection) -> None:
        raise CacheError("select: the pairs belong to another layer, so this layer cannot evict them")
