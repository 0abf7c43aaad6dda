"""Read one conversation's keys and values from the blocks of another engine's paged cache.

The engine's kernels may keep the numbers of a block in any order, as long as it is the same in every block. ``places_in_block``
finds it by writing into a block of its own. Where each pair is a row of the block, kernels that take a block table read it in
place, and nothing is gathered.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from loopserve.core.errors import InputError
from loopserve.core.kv.buffers import Known
from loopserve.core.kv.key_summaries import KeySummaries
from loopserve.kernels.decode_attention import reads_blocks
from loopserve.kernels.gather_kv import gather_kv
from loopserve.kernels.paged import Paged

Write = Callable[[Tensor, Tensor, Tensor], None]
"""Stores keys and values ``[block_size, 1, D]`` in a cache of one block of one head, ``[1, 1, block_size, 2 * D]``."""


def places_in_block(write: Write, block_size: int, dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return where in a head's keys, and in its values, the numbers of a block lie: int64 ``[block_size, dim]`` each.

    The keys of a block fill the first half of it, the values the second one.
    """
    numbers = torch.arange(block_size * dim, dtype=torch.long, device="cpu")
    found = torch.zeros(2, block_size * dim, dtype=torch.long, device="cpu")
    for unit in (1, 256, 65536):  # digits, since 16-bit floats count exactly up to 256 only
        digit = (numbers // unit % 256).to(dtype).view(block_size, 1, dim)
        cache = torch.zeros(1, 1, block_size, 2 * dim, dtype=dtype, device="cpu")
        write(digit, digit.clone(), cache)
        found += cache.view(2, -1).long() * unit
    places = found.argsort(dim=1).view(2, block_size, dim)
    return places[0], places[1]


class _Part(Protocol):
    """Read the keys, or the values, of all blocks of a layer."""

    def whole(self, blocks: Tensor) -> Tensor:
        """Return all pairs of these blocks, in order: ``[Hkv, len(blocks) * block_size, D]``."""

    def chosen(self, blocks: Tensor, heads: Tensor, slots: Tensor) -> Tensor:
        """Return what lies at slots of heads of blocks, int64 ``[n]`` each: ``[n, D]``."""


class _InRows:
    """Read them where each pair is a row of its block, by a view ``[Hkv, blocks, block_size, D]``."""

    def __init__(self, blocks: Tensor) -> None:
        self.blocks = blocks

    def whole(self, blocks: Tensor) -> Tensor:
        return self.blocks[:, blocks].flatten(1, 2)

    def chosen(self, blocks: Tensor, heads: Tensor, slots: Tensor) -> Tensor:
        return self.blocks[heads, blocks, slots]


class _InPlaces:
    """Read them where the numbers of a block are in an order of the engine's own."""

    def __init__(self, cache: Tensor, half: int, places: Tensor) -> None:
        """cache: ``[blocks, Hkv, block_size, 2 * D]``. half: 0 keys, 1 values. places: of ``places_in_block``."""
        blocks, heads, self._size, _ = cache.shape
        self._places, self._dim = places, places.shape[1]
        numbers = self._size * self._dim
        self._strides = cache.stride(0), cache.stride(1)
        span = (blocks - 1) * self._strides[0] + (heads - 1) * self._strides[1] + 2 * numbers
        self._numbers = cache.as_strided((span,), (1,))[half * numbers :]
        whole = cache.view(blocks, heads, 2, numbers)[:, :, half]
        plain = torch.arange(numbers, dtype=torch.long, device="cpu")
        by_rows = torch.equal(places.flatten(), plain)
        self._by_rows = by_rows and not any(each % self._dim for each in self._strides)
        self._blocks, self._shuffled = whole.view(blocks, heads, self._size, self._dim), False
        if torch.equal(places.t().flatten(), plain):
            self._blocks = whole.view(blocks, heads, self._dim, self._size).transpose(2, 3)
        elif not by_rows:
            self._shuffled = True

    def whole(self, blocks: Tensor) -> Tensor:
        read = self._blocks[blocks]
        if self._shuffled:
            read = read.flatten(2)[..., self._places.flatten()].unflatten(2, self._places.shape)
        return read.transpose(0, 1).flatten(1, 2)

    def chosen(self, blocks: Tensor, heads: Tensor, slots: Tensor) -> Tensor:
        starts = blocks * self._strides[0] + heads * self._strides[1]
        if self._by_rows:
            rows = self._numbers[: len(self._numbers) // self._dim * self._dim].view(-1, self._dim)
            return rows.index_select(0, starts // self._dim + slots)
        where = (
            starts[:, None] + self._places[slots]
        )  # one index per number: faster than to index blocks, heads and slots
        return self._numbers.index_select(0, where.flatten()).view(-1, self._dim)


class _Codes:
    """Hold the summaries of every page of a layer's blocks, valid for as long as nobody writes into the page."""

    def __init__(self, pages: int, like: KeySummaries) -> None:
        def space(part: Tensor) -> Tensor:  # untouched memory costs nothing
            return torch.empty(part.shape[0], pages, *part.shape[2:], dtype=part.dtype, device=part.device)

        self.low, self.high = space(like.low), space(like.high)
        self.codes = space(like.codes) if like.bits else None
        self.valid = torch.zeros(pages, dtype=torch.bool, device=like.low.device)


class BlockLayer:
    """Read one layer's part of the paged cache."""

    keys: _Part
    values: _Part

    def __init__(self) -> None:
        self.cache: Tensor | None = None  # [blocks, Hkv, block_size, 2 * D]
        self._codes: dict[tuple[int, int], _Codes] = {}  # by page and bits

    def bind(self, cache: Tensor, write: Write) -> None:
        """Read from ``cache`` ``[blocks, Hkv, block_size, 2 * D]`` from now on. write: how the engine writes into one."""
        if not self._is_bound(cache):
            places = places_in_block(write, self.block_size, cache.shape[3] // 2, cache.dtype)
            self.keys, self.values = (_InPlaces(cache, half, places[half]) for half in (0, 1))

    def bind_rows(self, cache: Tensor) -> None:
        """Read from such a cache whose last dimension is a pair's key and its value; the others may have any strides."""
        if not self._is_bound(cache):
            self.keys, self.values = (_InRows(half.transpose(0, 1)) for half in cache.chunk(2, dim=-1))

    def _is_bound(self, cache: Tensor) -> bool:
        """Return whether ``cache`` is the one read from so far; take it over if not."""
        if self.cache is not None and self.cache.data_ptr() == cache.data_ptr():
            return True
        _, self.heads, self.block_size, _ = cache.shape
        self.cache, self._codes = cache, {}
        return False

    def written(self, slots: Tensor) -> None:
        """Note that pairs were written at slots (block * block_size + place): codes of their pages are void."""
        for (page, _), codes in self._codes.items():
            codes.valid[slots.clamp(min=0) // page] = (
                False  # -1 is padding; to void codes costs no more than coding again
            )

    def known_codes(self, summaries: KeySummaries) -> _Codes | None:
        """Return the layer's codes in pages and bits as of ``summaries``, if there are any."""
        return self._codes.get((summaries.page, summaries.bits))

    def codes(self, summaries: KeySummaries) -> _Codes | None:
        """Return the same, made at the first call; None where a block does not hold whole pages."""
        assert self.cache is not None
        if self.block_size % summaries.page:
            return None
        pages = self.cache.shape[0] * (self.block_size // summaries.page)
        if (key := (summaries.page, summaries.bits)) not in self._codes:
            self._codes[key] = _Codes(pages, summaries)
        return self._codes[key]


class Table:
    """Hold the blocks of one request, in order, and count what is read through them."""

    def __init__(self) -> None:
        self.blocks = torch.empty(0, dtype=torch.long, device="cpu")
        self.counts: Counter[str] = Counter()


class PagedPairs:
    """Show one request's pairs of one layer. The engine that owns the blocks does the writing."""

    in_place = False  # each access to keys or values copies them
    intact = True  # so nobody can write into the store

    def __init__(self, layer: BlockLayer, table: Table) -> None:
        self.layer, self.table, self.length = layer, table, 0

    @property
    def heads(self) -> int:
        return self.layer.heads

    @property
    def _cache(self) -> Tensor:
        assert self.layer.cache is not None
        return self.layer.cache

    @property
    def dtype(self) -> torch.dtype:
        return self._cache.dtype

    @property
    def device(self) -> torch.device:
        return self._cache.device

    @property
    def pair_bytes(self) -> int:
        return self._cache.shape[3] * self._cache.element_size()

    @property
    def pairs(self) -> int:
        return self.heads * self.length

    @property
    def nbytes(self) -> int:
        return self.pairs * self.pair_bytes

    @property
    def allocated_nbytes(self) -> int:
        return 0  # by this conversation; the engine has allocated the blocks

    @property
    def keys(self) -> Tensor:
        self.table.counts["gathered_keys"] += 1
        return self.layer.keys.whole(self.table.blocks)[:, : self.length]

    @property
    def values(self) -> Tensor:
        self.table.counts["gathered_values"] += 1
        return self.layer.values.whole(self.table.blocks)[:, : self.length]

    @property
    def rows(self) -> tuple[Paged, Paged] | None:
        if not isinstance(self.layer.keys, _InRows) or not isinstance(self.layer.values, _InRows):
            return None
        keys, values = (
            Paged(each.blocks, self.table.blocks, self.length) for each in (self.layer.keys, self.layer.values)
        )
        return (keys, values) if reads_blocks(keys, values) else None

    def gather(self, columns: Tensor, known: Known | None = None) -> tuple[Tensor, Tensor]:
        """Return copies of pairs; see ``PairStore``. columns: rising in each head."""
        self.table.counts["chosen_pairs"] += columns.numel()
        keys, values, missing = self._of(known, columns)
        heads, places = missing.nonzero(as_tuple=True)
        wanted = columns[heads, places]
        self.table.counts["read_pairs"] += len(wanted)
        blocks, slots = self.table.blocks[wanted // self.layer.block_size], wanted % self.layer.block_size
        keys[heads, places] = self.layer.keys.chosen(blocks, heads, slots)
        values[heads, places] = self.layer.values.chosen(blocks, heads, slots)
        return keys, values

    def _of(self, known: Known | None, columns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return keys and values of columns, from the copies that are known, and which of them are missing there."""
        if known is None or not known.columns.shape[1]:
            empty = [self._cache.new_empty(*columns.shape, self._cache.shape[3] // 2) for _ in range(2)]
            return empty[0], empty[1], torch.ones_like(columns, dtype=torch.bool)
        before, keys, values = known
        found = torch.searchsorted(before, columns.contiguous()).clamp(max=before.shape[1] - 1)
        return *gather_kv(keys, values, found), before.gather(1, found) != columns

    def since(self, column: int) -> tuple[Tensor, Tensor]:
        return self._since(self.layer.keys, column), self._since(self.layer.values, column)

    def _since(self, part: _Part, column: int) -> Tensor:
        first = column // self.layer.block_size
        start = first * self.layer.block_size
        return part.whole(self.table.blocks[first:])[:, column - start : self.length - start]

    def summarise(self, summaries: KeySummaries) -> None:
        """Bring summaries up to date: pages that another request has coded are copied, the others are coded and kept for it."""
        page, per_block = summaries.page, max(1, self.layer.block_size // summaries.page)
        if summaries.columns == self.length:
            return
        first, finished = summaries.finished, self.length // page
        numbers = torch.arange(first, finished, device=self.device)
        places = self.table.blocks[numbers // per_block] * per_block + numbers % per_block
        shared, known = self.layer.known_codes(summaries), 0
        if shared is not None and finished > first:
            known = int(shared.valid[places].long().cumprod(0).sum())
            mine = places[:known]
            summaries.put(
                shared.low[:, mine], shared.high[:, mine], None if shared.codes is None else shared.codes[:, mine]
            )
            self.table.counts["shared_pages"] += known
        if summaries.columns < self.length:
            summaries.extend(self._since(self.layer.keys, (first + known) * page))
        if first + known < finished and (shared := self.layer.codes(summaries)) is not None:
            mine, fresh = places[known:], slice(first + known, finished)
            shared.low[:, mine], shared.high[:, mine] = summaries.low[:, fresh], summaries.high[:, fresh]
            if shared.codes is not None:
                shared.codes[:, mine] = summaries.codes[:, fresh]
            shared.valid[mine] = True
            self.table.counts["coded_pages"] += finished - first - known

    def append(self, keys: Tensor, values: Tensor) -> None:
        self.length += keys.shape[1]

    def reserve(self, length: int) -> None:
        """Do nothing: the engine provides the blocks."""

    def copy(self) -> PagedPairs:
        raise InputError("pairs in another engine's blocks are not copied: it shares them between requests itself")
