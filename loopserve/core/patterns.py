"""Attention patterns: which cells of a block of new queries are computed. Each says its mask, its cost, and how to attend.

Geometry of a block: m new queries are the last of n stored columns; query i stands at column n - m + i and sees the columns up to it.
Knows no policy; the property that holds for every pattern is ``attend == dense attention under to_mask()``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from loopserve.kernels.block_sparse import block_sparse
from loopserve.kernels.block_sparse.reference import block_mask
from loopserve.kernels.dense_attention import dense_attention
from loopserve.kernels.vertical_slash import vertical_slash
from loopserve.kernels.vertical_slash.reference import line_mask

TILE = 64


class AttentionPattern(ABC):
    """A causal choice of cells per query head, in which every query sees itself."""

    heads: int
    new_tokens: int
    total_tokens: int

    @abstractmethod
    def to_mask(self) -> Tensor:
        """The cells as bool ``[Hq, Tq, Tk]``; for tests and pictures."""

    @abstractmethod
    def attend(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        *,
        scaling: float,
        softcap: float | None = None,
        first_valid: Tensor | None = None,
        need_lse: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """(output ``[Hq, Tq, D]``, log-sum-exp ``[Hq, Tq]`` if asked for), softmax over the cells of the pattern only."""

    @abstractmethod
    def cell_density(self) -> Tensor:
        """Computed pairs over causal pairs, per head ``[Hq]``."""

    @abstractmethod
    def tile_density(self) -> Tensor:
        """64 x 64 tiles a kernel computes over those that dense attention computes, per head ``[Hq]``; at most 1."""

    def coverage(self, probabilities: Tensor, columns: Tensor) -> Tensor:
        """Share of the mass of softmax rows ``[Hq, r, n]`` at ``columns`` ``[r]`` that lies inside the pattern, per head ``[Hq]``."""
        rows = columns - (self.total_tokens - self.new_tokens)
        inside = probabilities * self.to_mask_rows(rows)
        return inside.sum((1, 2)) / probabilities.sum((1, 2)).clamp(min=1e-30)

    @abstractmethod
    def to_mask_rows(self, rows: Tensor) -> Tensor:
        """The cells of some rows of the block (indices ``[r]``): bool ``[Hq, r, Tk]``."""

    @property
    def causal_pairs(self) -> int:
        return self.new_tokens * (self.total_tokens - self.new_tokens) + self.new_tokens * (self.new_tokens + 1) // 2

    def _columns(self, rows: Tensor) -> Tensor:
        return rows + self.total_tokens - self.new_tokens

    def _all_rows(self, device: torch.device | None = None) -> Tensor:
        return torch.arange(self.new_tokens, device=device)

    def _dense_tiles(self) -> int:
        """Key tiles that dense attention computes, summed over the row tiles."""
        history = self.total_tokens - self.new_tokens
        ends = [min(start + TILE, self.new_tokens) + history for start in range(0, self.new_tokens, TILE)]
        return sum(-(-end // TILE) for end in ends)


@dataclass(frozen=True)
class DensePattern(AttentionPattern):
    """Every causal cell."""

    heads: int
    new_tokens: int
    total_tokens: int

    def to_mask(self) -> Tensor:
        return self.to_mask_rows(self._all_rows())

    def to_mask_rows(self, rows: Tensor) -> Tensor:
        seen = torch.arange(self.total_tokens, device=rows.device) <= self._columns(rows)[:, None]
        return seen.expand(self.heads, -1, -1)

    def attend(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        *,
        scaling: float,
        softcap: float | None = None,
        first_valid: Tensor | None = None,
        need_lse: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        return dense_attention(
            queries, keys, values, scaling=scaling, softcap=softcap, first_valid=first_valid, need_lse=need_lse
        )

    def cell_density(self) -> Tensor:
        return torch.ones(self.heads)

    def tile_density(self) -> Tensor:
        return torch.ones(self.heads)


@dataclass(frozen=True, eq=False)
class LinePattern(AttentionPattern):
    """Vertical lines (key columns) and slash lines (offsets query minus key), each set bool ``[Hq, Tk]``.

    The diagonal (offset 0) is always in, so every query sees itself. Heads marked in ``dense_heads`` ``[Hq]`` compute every cell.
    """

    verticals: Tensor
    slashes: Tensor
    new_tokens: int
    dense_heads: Tensor | None = None

    def __post_init__(self) -> None:
        if (
            self.verticals.shape != self.slashes.shape
            or self.verticals.dtype != torch.bool
            or self.slashes.dtype != torch.bool
        ):
            raise ValueError("LinePattern: verticals and slashes must both be bool [Hq, Tk]")
        if not 0 < self.new_tokens <= self.verticals.shape[1]:
            raise ValueError(f"LinePattern: {self.new_tokens} new tokens of {self.verticals.shape[1]}")
        slashes = self.slashes.clone()
        slashes[:, 0] = True
        if self.dense_heads is not None:
            slashes |= self.dense_heads[:, None]
        object.__setattr__(self, "slashes", slashes)

    @classmethod
    def window(cls, heads: int, new_tokens: int, total_tokens: int, sinks: Tensor, local: int) -> LinePattern:
        """Sink columns (bool ``[Hq, Tk]``) and the last ``local`` columns of each query: the A shape."""
        slashes = (torch.arange(total_tokens, device=sinks.device) < local).expand(heads, -1)
        return cls(sinks, slashes, new_tokens)

    @property
    def heads(self) -> int:  # type: ignore[override]
        return self.verticals.shape[0]

    @property
    def total_tokens(self) -> int:  # type: ignore[override]
        return self.verticals.shape[1]

    def to_mask(self) -> Tensor:
        return self.to_mask_rows(self._all_rows(self.verticals.device))

    def to_mask_rows(self, rows: Tensor) -> Tensor:
        return line_mask(self.verticals, self.slashes, self._columns(rows))

    def attend(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        *,
        scaling: float,
        softcap: float | None = None,
        first_valid: Tensor | None = None,
        need_lse: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        if self.dense_heads is None or not bool(self.dense_heads.any()):
            return vertical_slash(
                queries,
                keys,
                values,
                self.verticals,
                self.slashes,
                scaling=scaling,
                softcap=softcap,
                first_valid=first_valid,
            )
        output = queries.new_empty(queries.shape[0], self.new_tokens, values.shape[2])
        lse = torch.empty(queries.shape[:2], device=queries.device) if need_lse else None
        # A subset of heads need not be whole groups: each of its query heads gets its KV head by index.
        for pattern, heads in self._parts():
            owners = heads // (queries.shape[0] // keys.shape[0])
            found, found_lse = pattern.attend(
                queries[heads],
                keys[owners],
                values[owners],
                scaling=scaling,
                softcap=softcap,
                first_valid=first_valid[owners] if first_valid is not None else None,
                need_lse=need_lse,
            )
            output[heads] = found
            if lse is not None and found_lse is not None:
                lse[heads] = found_lse
        return output, lse

    def _parts(self) -> list[tuple[AttentionPattern, Tensor]]:
        """The dense heads and the others, each with a pattern of its own."""
        assert self.dense_heads is not None
        dense, sparse = self.dense_heads.nonzero().flatten(), (~self.dense_heads).nonzero().flatten()
        parts: list[tuple[AttentionPattern, Tensor]] = [
            (DensePattern(len(dense), self.new_tokens, self.total_tokens), dense)
        ]
        if len(sparse):
            parts.append((LinePattern(self.verticals[sparse], self.slashes[sparse], self.new_tokens), sparse))
        return parts

    def _line_lengths(self) -> Tensor:
        history = self.total_tokens - self.new_tokens
        line = torch.arange(self.total_tokens, device=self.verticals.device)
        return self.new_tokens - (line - history).clamp(min=0)

    def cell_density(self) -> Tensor:
        """By inclusion and exclusion: a vertical j and a slash d share one cell if history <= j + d < n, and none otherwise."""
        lengths = self._line_lengths()
        lines = ((self.verticals.long() + self.slashes.long()) * lengths).sum(1)
        below = torch.nn.functional.pad(self.slashes.long().cumsum(1), (1, 0))  # slashes with an offset below x
        column = torch.arange(self.total_tokens, device=self.verticals.device)
        first = (self.total_tokens - self.new_tokens - column).clamp(min=0)
        crossings = ((below[:, self.total_tokens - column] - below[:, first]) * self.verticals).sum(1)
        return (lines - crossings).double() / self.causal_pairs

    def tile_density(self) -> Tensor:
        """Per tile of 64 rows: key tiles of the slash ranges, plus key tiles of the packed verticals outside them."""
        counts = torch.zeros(self.heads, dtype=torch.long, device=self.verticals.device)
        below = torch.nn.functional.pad(self.slashes.int().cumsum(1), (1, 0))
        history = self.total_tokens - self.new_tokens
        column = torch.arange(self.total_tokens, device=self.verticals.device)
        for start in range(0, self.new_tokens, TILE):
            low, high = history + start, history + min(start + TILE, self.new_tokens)
            seen = column[:high]
            in_range = below[:, high - seen] > below[:, (low - seen).clamp(min=0)]
            packed = self.verticals[:, :high] & ~in_range
            tiles = -(-in_range.sum(1) // TILE) + -(-packed.sum(1) // TILE)
            counts += tiles.clamp(max=-(-high // TILE))
        return counts.double() / self._dense_tiles()


@dataclass(frozen=True, eq=False)
class BlockPattern(AttentionPattern):
    """Key tiles per query tile: bool ``[Hq, ceil(Tq / tile), ceil(Tk / tile)]``, causal inside; own tiles are always in."""

    blocks: Tensor
    new_tokens: int
    total_tokens: int
    tile: int = TILE

    def __post_init__(self) -> None:
        wanted = (-(-self.new_tokens // self.tile), -(-self.total_tokens // self.tile))
        if self.blocks.dim() != 3 or self.blocks.shape[1:] != wanted or self.blocks.dtype != torch.bool:
            raise ValueError(
                f"BlockPattern: blocks {list(self.blocks.shape)} must be bool [Hq, {wanted[0]}, {wanted[1]}]"
            )
        blocks = self.blocks.clone()
        own = self._columns(self._all_rows(blocks.device))
        blocks[:, (own - own[0]) // self.tile, own // self.tile] = True
        object.__setattr__(self, "blocks", blocks)

    @property
    def heads(self) -> int:  # type: ignore[override]
        return self.blocks.shape[0]

    def to_mask(self) -> Tensor:
        return self.to_mask_rows(self._all_rows(self.blocks.device))

    def to_mask_rows(self, rows: Tensor) -> Tensor:
        cells = block_mask(self.blocks, self.tile, self.new_tokens, self.total_tokens)[:, rows]
        return cells & (torch.arange(self.total_tokens, device=rows.device) <= self._columns(rows)[:, None])

    def attend(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        *,
        scaling: float,
        softcap: float | None = None,
        first_valid: Tensor | None = None,
        need_lse: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        return block_sparse(
            queries,
            keys,
            values,
            self.blocks,
            tile=self.tile,
            scaling=scaling,
            softcap=softcap,
            first_valid=first_valid,
        )

    def _cells(self) -> Tensor:
        """Causal cells of each tile of the block: ``[query tiles, key tiles]``."""
        columns = self._columns(self._all_rows(self.blocks.device))
        edges = torch.arange(self.blocks.shape[2], device=columns.device) * self.tile
        per_row = (columns[:, None] + 1 - edges).clamp(0, self.tile)
        filled = torch.nn.functional.pad(per_row, (0, 0, 0, self.blocks.shape[1] * self.tile - self.new_tokens))
        return filled.view(self.blocks.shape[1], self.tile, -1).sum(1)

    def cell_density(self) -> Tensor:
        return (self.blocks * self._cells()).sum((1, 2)).double() / self.causal_pairs

    def tile_density(self) -> Tensor:
        cells = self._cells()
        return (self.blocks & (cells > 0)).sum((1, 2)).double() / int((cells > 0).sum())
