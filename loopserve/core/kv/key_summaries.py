"""Summarise keys as a store grows, so that a query can rank pages or tokens and read a fraction of the keys' bytes.

A page is a run of neighbouring columns. Its bounds are the smallest and the largest value of each key channel. They give an upper
bound of any query's logit with any key of the page (Quest, https://arxiv.org/abs/2406.10774). Within the bounds each key can be
kept as a code of a few bits per channel. The code gives an approximation of the logit itself. Bounds of pages with codes of 2 bits
are narrower, where that makes the codes' squared error smaller: these are no bounds of the logit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from loopserve.core.errors import PolicyError
from loopserve.kernels.key_codes import (
    BITS,
    KeyCodes,
    code_jumps,
    code_logits,
    code_threshold,
    page_scores,
    summarise_pages,
)

CODE_BITS = (0, *BITS)


class KeySummaries:
    """Hold per-page bounds of one layer's keys and, optionally, a code of each key.

    ``update`` computes what is new. Where a kernel does so together with its choice: ``prepare``, the kernel on ``keys_coded``,
    ``confirm``.

    All of it can be computed again from the store's keys. A copy (a fork, or the snapshot that an undo restores) therefore starts
    empty and is filled at its next ``update`` or ``prepare``. Snapshots stay small and cannot disagree with a truncated store.
    """

    def __init__(self, page: int, bits: int = 0) -> None:
        """Start empty. page: columns per page, at least 1. bits: per channel of a key's code, one of ``CODE_BITS``; 0 = no codes."""
        if page < 1 or bits not in CODE_BITS:
            raise ValueError(f"KeySummaries: page={page} must be at least 1 and bits={bits} one of {CODE_BITS}")
        self.page = page
        self.bits = bits
        self.columns = 0  # columns of the store summarised so far
        self._capacity = -1  # pages for which every buffer has capacity
        self._stale: int | None = None  # pages from here on are not summarised yet, though they are counted
        self._coded: KeyCodes | None = None
        self._parts: dict[
            str, Tensor
        ] = {}  # low, high [Hkv, capacity, D]; codes uint8 [Hkv, capacity, page, D * bits / 8]

    def __deepcopy__(self, memo: dict[int, Any]) -> KeySummaries:
        return KeySummaries(self.page, self.bits)

    def pack(self) -> tuple[int, int]:
        """Return the arguments of an empty object, which is filled from the store like a copy (``core.policy.state``)."""
        return self.page, self.bits

    @classmethod
    def unpack(cls, packed: Any) -> KeySummaries:
        page, bits = packed
        return cls(page, bits)

    @property
    def pages(self) -> int:
        return -(-self.columns // self.page)

    @property
    def low(self) -> Tensor:
        """Return the lower bound per channel ``[Hkv, pages, D]``: the smallest value, or more for codes of 2 bits."""
        return self._part("low")

    @property
    def high(self) -> Tensor:
        """Return the upper bound per channel ``[Hkv, pages, D]``: the largest value, or less for codes of 2 bits."""
        return self._part("high")

    @property
    def codes(self) -> Tensor:
        """Return packed codes ``[Hkv, pages, page, bytes]``. Codes behind the last column are undefined."""
        return self._part("codes")

    def _part(self, name: str) -> Tensor:
        assert name in self._parts, "update() first"
        self._require_written()
        return self._parts[name][:, : self.pages]

    def _require_written(self) -> None:
        """Raise PolicyError while the pages that ``prepare`` counted are not summarised."""
        if self._stale is not None:
            raise PolicyError(
                "key summaries are read between a request for a selection and its result: read them before inputs.request_selection"
            )

    @property
    def nbytes(self) -> int:
        """Return the bytes held. As many are read whenever all pages are ranked."""
        heads, _, dim = self._parts["low"].shape
        bounds = 2 * heads * self.pages * dim * self._parts["low"].element_size()
        return bounds + heads * self.columns * dim * self.bits // 8

    def update(self, keys: Tensor) -> None:
        """Summarise the store's keys ``[Hkv, Tk, D]``. Only the last, unfinished page and new pages are computed.

        A store that became shorter (truncated, or evicted from) is summarised from the start. Columns summarised before are assumed
        to be unchanged otherwise.
        """
        first = self.prepare(keys)
        if first is not None:
            summarise_pages(keys, self.page, first, *self._held(), self.bits)
            self.confirm()

    def prepare(self, keys: Tensor) -> int | None:
        """Provide capacity for keys ``[Hkv, Tk, D]``; return the first page that is to be summarised, or None if all are.

        The caller has the pages summarised into ``keys_coded`` and then calls ``confirm``. Until then they count as not summarised.
        """
        total = keys.shape[1]
        if total == self.columns and self._stale is None:
            return None
        if total < self.columns:
            self.columns, self._stale = 0, None
        first = self.finished if self._stale is None else self._stale
        self._buffers(-(-total // self.page), keys)
        self.columns, self._stale = total, first
        return first

    def confirm(self) -> None:
        """Note that the pages from ``prepare`` are summarised."""
        self._stale = None

    @property
    def finished(self) -> int:
        """Return the pages whose columns are all there; no later key changes them."""
        return self.columns // self.page

    def extend(self, keys: Tensor) -> None:
        """Summarise keys ``[Hkv, n, D]`` that follow the finished pages; those of an unfinished page are among them."""
        first = self.finished
        low, high, codes = self._buffers(first - (-keys.shape[1] // self.page), keys)
        codes = None if codes is None else codes[:, first:]
        summarise_pages(keys, self.page, 0, low[:, first:], high[:, first:], codes, self.bits)
        self.columns = first * self.page + keys.shape[1]

    def put(self, low: Tensor, high: Tensor, codes: Tensor | None) -> None:
        """Take over pages that were summarised before, low and high ``[Hkv, P, D]``, behind the finished ones."""
        first, pages = self.finished, low.shape[1]
        for held, given in zip(self._buffers(first + pages, low), (low, high, codes), strict=True):
            if held is not None and given is not None:
                held[:, first : first + pages] = given
        self.columns = (first + pages) * self.page

    def _buffers(self, pages: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return buffers for so many pages; like: of the keys' heads, channels, dtype and device."""
        if self._capacity >= pages:
            return self._held()
        heads, _, dim = like.shape
        for name in ("low", "high"):
            self._reserve(name, pages, like, (heads, dim), like.dtype)
        if self.bits:
            self._reserve("codes", pages, like, (heads, self.page, dim * self.bits // 8), torch.uint8)
        self._capacity = min(each.shape[1] for each in self._parts.values())
        return self._held()

    def _held(self) -> tuple[Tensor, Tensor, Tensor | None]:
        return self._parts["low"], self._parts["high"], self._parts.get("codes")

    def _reserve(self, name: str, pages: int, keys: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        """Provide a part's buffer ``[Hkv, capacity, ...]`` with capacity for all pages. It grows by half."""
        held = self._parts.get(name)
        if held is None or held.shape[1] < pages:
            grown = torch.empty(shape[0], pages + pages // 2 + 8, *shape[1:], dtype=dtype, device=keys.device)
            if held is not None:
                grown[:, : held.shape[1]] = held
            self._parts[name] = grown

    def scores(self, queries: Tensor, scaling: float) -> Tensor:
        """Return the upper bound of each page's logits for queries ``[Hq, r, D]``, per KV head: float32 ``[Hkv, pages]``."""
        return page_scores(queries, self.low, self.high, scaling=scaling)

    def logits(self, queries: Tensor, scaling: float) -> Tensor:
        """Return approximate logits of all keys from their codes, for queries ``[Hq, r, D]``: float32 ``[Hkv, group * r,
        columns]``.
        """
        self._require_written()
        return code_logits(queries, self.keys_coded, scaling=scaling)

    def jumps(
        self, queries: Tensor, base: Tensor, tail: int, budget: int, scaling: float, observed: Tensor | None = None
    ) -> Tensor:
        """Return base columns ``[Hkv, S]`` and the ``budget`` best others before ``tail``, by the codes; see ``code_jumps``."""
        self._require_written()
        return code_jumps(queries, self.keys_coded, base, tail, budget, scaling=scaling, observed=observed)

    def heavy(
        self, queries: Tensor, base: Tensor, tail: int, threshold: float, least: int, most: int, **options: Any
    ) -> tuple[Tensor, Tensor]:
        """Return base columns and all others before ``tail`` of at least a weight, and how many per head; see
        ``code_threshold``.
        """
        self._require_written()
        return code_threshold(queries, self.keys_coded, base, tail, threshold, least, most, **options)

    @property
    def keys_coded(self) -> KeyCodes:
        """Return bounds and codes of all columns, as the kernels take them; the same object until the buffers grow."""
        low, high, codes = self._held()
        if self._coded is None or self._coded.low is not low:
            assert codes is not None, "bits=0: there are no codes"
            self._coded = KeyCodes(low, high, codes, self.bits, self.columns)
        self._coded.columns = self.columns
        return self._coded


def best_pages(bounds: Tensor, free: Tensor, page: int, budget: int) -> Tensor:
    """Return up to ``budget`` free columns per head, page by page in the order of the bounds: bool ``[Hkv, Tk]``.

    bounds ``[Hkv, P]``, free bool ``[Hkv, P * page or fewer]``. Of equal bounds the lowest page comes first. The last page that
    fits gives its first columns. A head with fewer free columns gives all.
    """
    heads, total = free.shape
    padded = free.new_zeros(heads, bounds.shape[1] * page)
    padded[:, :total] = free
    order = bounds.argsort(dim=1, descending=True, stable=True)[..., None].expand(-1, -1, page)
    ranked = padded.view(heads, -1, page).gather(1, order)
    taken = ranked & (ranked.flatten(1).cumsum(1).view_as(ranked) <= budget)
    return torch.zeros_like(ranked).scatter_(1, order, taken).flatten(1)[:, :total]
