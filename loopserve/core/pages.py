"""Short notes on the keys, kept up to date as a store grows, so that a query can rank pages or tokens at a fraction of the
keys' bytes.

A page is a run of neighbouring columns. Its bounds are the smallest and the largest value of each key channel; from both
follows an upper bound of any query's logit with any key of the page (Quest, https://arxiv.org/abs/2406.10774). Within
the bounds each key can be kept as a code of a few bits per channel; from it follows the logit itself, nearly.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from loopserve.kernels.page_bounds import page_bounds, page_scores

CODE_BITS = (0, 2, 4, 8)


class PageSummaries:
    """Per-page bounds of one layer's keys and, if wanted, a code of each key.

    Everything in it can be had again from the store's keys. A copy (a fork, or the snapshot that an undo restores)
    therefore starts empty and is filled at its next ``update``: snapshots stay small and can never disagree with a
    truncated store.
    """

    def __init__(self, page: int, bits: int = 0) -> None:
        """page: columns per page, at least 1. bits: per channel of a key's code, one of ``CODE_BITS``; 0 = no codes."""
        if page < 1 or bits not in CODE_BITS:
            raise ValueError(f"PageSummaries: page={page} must be at least 1 and bits={bits} one of {CODE_BITS}")
        self.page = page
        self.bits = bits
        self.columns = 0  # columns of the store summarised so far
        self._parts: dict[
            str, Tensor
        ] = {}  # low, high [Hkv, capacity, D]; codes uint8 [Hkv, capacity, page, D * bits / 8]

    def __deepcopy__(self, memo: dict[int, Any]) -> PageSummaries:
        return PageSummaries(self.page, self.bits)

    @property
    def pages(self) -> int:
        return -(-self.columns // self.page)

    @property
    def low(self) -> Tensor:
        """Smallest value per channel ``[Hkv, pages, D]``."""
        return self._part("low")

    @property
    def high(self) -> Tensor:
        """Largest value per channel ``[Hkv, pages, D]``."""
        return self._part("high")

    @property
    def codes(self) -> Tensor:
        """Packed codes ``[Hkv, pages, page, bytes]``; those behind the last column mean nothing."""
        return self._part("codes")

    def _part(self, name: str) -> Tensor:
        assert name in self._parts, "update() first"
        return self._parts[name][:, : self.pages]

    @property
    def nbytes(self) -> int:
        """Bytes held, and read whenever everything is ranked."""
        bounds = 2 * self.low.numel() * self.low.element_size()
        return bounds + (self.codes[:, :, 0].numel() // self.pages * self.columns if self.bits else 0)

    def update(self, keys: Tensor) -> None:
        """Take in the store's keys ``[Hkv, Tk, D]``: only the last, unfinished page and new pages are computed.

        A store that became shorter (truncated, or evicted from) is summarised afresh; columns taken in before are assumed
        not to have changed otherwise.
        """
        total = keys.shape[1]
        if total == self.columns:
            return
        if total < self.columns:
            self.columns = 0
        first = self.columns // self.page
        fresh = keys[:, first * self.page :]
        low, high = page_bounds(fresh, self.page)
        found = {"low": low, "high": high}
        if self.bits:
            found["codes"] = encode(fresh, low, high, self.page, self.bits)
        for name, part in found.items():
            self._reserve(name, first, part)[:, first : first + part.shape[1]] = part
        self.columns = total

    def _reserve(self, name: str, kept: int, part: Tensor) -> Tensor:
        """The buffer of a part with room for ``part`` behind the ``kept`` first pages; it grows by half."""
        held = self._parts.get(name)
        needed = kept + part.shape[1]
        if held is None or held.shape[1] < needed:
            grown = part.new_empty(part.shape[0], needed + needed // 2 + 8, *part.shape[2:])
            if held is not None:
                grown[:, :kept] = held[:, :kept]
            self._parts[name] = held = grown
        return held

    def scores(self, queries: Tensor, scaling: float) -> Tensor:
        """Upper bound of the logits of each page for queries ``[Hq, r, D]``, per KV head: float32 ``[Hkv, pages]``."""
        return page_scores(queries, self.low, self.high, scaling=scaling)

    def logits(self, queries: Tensor, scaling: float) -> Tensor:
        """Nearly the logits of all keys, from their codes, for queries ``[Hq, r, D]``: float32 ``[Hkv, group * r, columns]``."""
        low, high = self.low.float(), self.high.float()
        heads, pages, channels = low.shape
        grouped = queries.float().reshape(heads, 1, -1, channels)
        step = (high - low) / (2**self.bits - 1)
        codes = unpack(self.codes, self.bits).float()
        inside = codes @ (grouped * step[:, :, None]).transpose(2, 3)  # [Hkv, pages, page, rows]
        found: Tensor = inside + low[:, :, None] @ grouped.transpose(2, 3)
        return found.view(heads, pages * self.page, -1)[:, : self.columns].transpose(1, 2) * scaling


def encode(keys: Tensor, low: Tensor, high: Tensor, page: int, bits: int) -> Tensor:
    """Keys ``[Hkv, T, D]`` as steps between their page's bounds ``[Hkv, P, D]``: packed uint8 ``[Hkv, P, page, D * bits / 8]``.

    The number of channels must be a multiple of ``8 / bits``.
    """
    per_byte = 8 // bits
    if keys.shape[2] % per_byte:
        raise ValueError(f"encode: {keys.shape[2]} channels do not fill bytes of {per_byte} codes")
    padded = pad(keys, (0, 0, 0, low.shape[1] * page - keys.shape[1]))
    paged = padded.view(keys.shape[0], -1, page, keys.shape[2]).float()
    step = ((high - low).float() / (2**bits - 1)).clamp(min=torch.finfo(torch.float32).tiny)
    codes = ((paged - low.float()[:, :, None]) / step[:, :, None]).round().clamp(0, 2**bits - 1).to(torch.uint8)
    packed: Tensor = codes[..., ::per_byte].clone()
    for place in range(1, per_byte):
        packed |= codes[..., place::per_byte] << (bits * place)
    return packed


def unpack(packed: Tensor, bits: int) -> Tensor:
    """Codes of packed bytes: uint8, the last dimension ``8 / bits`` times as long."""
    parts = [(packed >> (bits * place)) & (2**bits - 1) for place in range(8 // bits)]
    return torch.stack(parts, dim=-1).flatten(-2)
