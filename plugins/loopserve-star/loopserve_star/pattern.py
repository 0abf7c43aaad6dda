"""Define the cells of a star pattern, their cost and their attention."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from loopserve.core.policy.patterns import TILE, AttentionPattern
from loopserve_star.attention import star_attention


@dataclass(frozen=True)
class StarPattern(AttentionPattern):
    """Divide the columns into blocks of ``block`` that see themselves and the first ``anchor`` columns.

    The last ``whole`` rows see all columns. Blocks are counted from column 0, so a turn may begin and end within one.
    Raises ValueError for invalid sizes.
    """

    heads: int
    new_tokens: int
    total_tokens: int
    block: int
    anchor: int
    whole: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.new_tokens <= self.total_tokens or self.block < 1 or min(self.anchor, self.whole) < 0:
            raise ValueError(f"StarPattern: {self} is no pattern")

    @property
    def size(self) -> tuple[int, int, int]:
        return self.heads, self.new_tokens, self.total_tokens

    def rows(self, columns: Tensor) -> Tensor:
        keys, own = torch.arange(self.total_tokens, device=columns.device), columns[:, None]
        near = (keys < self.anchor) | (keys // self.block == own // self.block)
        cells = (keys <= own) & (near | (own >= self.total_tokens - self.whole))
        return cells.expand(self.heads, -1, -1)

    def attend(
        self, queries: Tensor, keys: Tensor, values: Tensor, *, need_lse: bool = False, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        output, lse = star_attention(queries, keys, values, self.block, self.anchor, self.whole, **options)
        return output, lse if need_lse else None

    def cell_density(self) -> Tensor:
        return torch.full((self.heads,), self._cells / self.causal_pairs, dtype=torch.float32, device="cpu")

    def tile_density(self) -> Tensor:
        return torch.full((self.heads,), self._tile_density, dtype=torch.float32, device="cpu")

    @cached_property
    def _cells(self) -> int:
        """Count the cells: a row sees all columns up to its own except those between anchor and block."""
        first = self.total_tokens - self.new_tokens
        columns = torch.arange(first, max(self.total_tokens - self.whole, first), device="cpu")
        between = (columns // self.block * self.block - self.anchor).clamp(min=0)
        return self.causal_pairs - int(between.sum())

    @cached_property
    def _tile_density(self) -> float:
        """Count the tiles of 64 keys that tiles of 64 rows compute: those of the anchor, and those from the block of
        their first row on.
        """
        computed = dense = 0
        for first in range(self.total_tokens - self.new_tokens, self.total_tokens, TILE):
            end = min(first + TILE, self.total_tokens)
            everything = -(-end // TILE)
            begin = first // self.block * self.block
            apart = begin > self.anchor and end <= self.total_tokens - self.whole
            near = -(-self.anchor // TILE) - (-(end - begin) // TILE)
            computed += min(near, everything) if apart else everything
            dense += everything
        return computed / dense
