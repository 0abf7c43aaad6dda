"""Define attention patterns: which cells of a block of new queries are computed, at which cost, and how.

Geometry of a block: the m new queries are the last of n stored columns. Query i stands at column n - m + i and sees the columns up
to it. Depends on no policy. For every pattern, ``attend`` equals dense attention under ``to_mask()``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from loopserve.kernels.block_sparse import block_sparse
from loopserve.kernels.dense_attention import dense_attention
from loopserve.kernels.paged import Rows, until
from loopserve.kernels.vertical_slash import vertical_slash

TILE = 64  # rows and keys of the tiles that tile density counts


class AttentionPattern(ABC):
    """Choose causal cells per query head. Every query sees itself."""

    @property
    @abstractmethod
    def size(self) -> tuple[int, int, int]:
        """Return (query heads, new tokens m, total tokens n)."""

    @property
    def causal_pairs(self) -> int:
        """Return the cells that dense attention computes for one head."""
        _, new, total = self.size
        return new * (total - new) + new * (new + 1) // 2

    def to_mask(self) -> Tensor:
        """Return the cells of the whole block, bool ``[Hq, Tq, Tk]``. For tests and plots: memory grows with Tq times Tk."""
        _, new, total = self.size
        return self.rows(torch.arange(total - new, total, device="cpu"))

    @property
    def reads_blocks(self) -> bool:
        """Return whether ``attend`` takes keys and values in the blocks of a paged cache (``kernels.paged.Paged``) as well."""
        return False

    @abstractmethod
    def rows(self, columns: Tensor) -> Tensor:
        """Return the cells of the queries at ``columns`` int64 ``[r]``: bool ``[Hq, r, Tk]``."""

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
        """Return the softmax attention over the cells of the pattern only: output ``[Hq, Tq, D]``, and the log-sum-exp float32
        ``[Hq, Tq]`` with ``need_lse``.

        first_valid ``[Hkv]``: columns before it are filler and never attended, whatever the pattern says.
        """

    @abstractmethod
    def cell_density(self) -> Tensor:
        """Return computed pairs over causal pairs, float32 ``[Hq]``."""

    @abstractmethod
    def tile_density(self) -> Tensor:
        """Return the 64 x 64 tiles that a kernel computes over those of dense attention, float32 ``[Hq]``; at most 1."""

    def coverage(self, probabilities: Tensor, columns: Tensor) -> Tensor:
        """Return the share of the mass of softmax rows ``[Hq, r, n]`` at ``columns`` ``[r]`` that lies inside the pattern,
        ``[Hq]``.
        """
        inside = (probabilities * self.rows(columns)).sum((1, 2))
        whole = probabilities.sum((1, 2))
        return torch.where(whole > 0, inside / whole.clamp(min=1e-30), 1.0)


def _tile_ends(new_tokens: int, total_tokens: int) -> list[int]:
    """Return one past the last column that each 64-row tile of the block sees."""
    history = total_tokens - new_tokens
    return [history + min(start + TILE, new_tokens) for start in range(0, new_tokens, TILE)]


@dataclass(frozen=True)
class DensePattern(AttentionPattern):
    """Compute every causal cell."""

    heads: int
    new_tokens: int
    total_tokens: int

    @property
    def size(self) -> tuple[int, int, int]:
        return self.heads, self.new_tokens, self.total_tokens

    def rows(self, columns: Tensor) -> Tensor:
        seen = torch.arange(self.total_tokens, device=columns.device) <= columns[:, None]
        return seen.expand(self.heads, -1, -1)

    def attend(
        self, queries: Tensor, keys: Tensor, values: Tensor, *, need_lse: bool = False, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        return dense_attention(queries, keys, values, need_lse=need_lse, **options)

    def cell_density(self) -> Tensor:
        return torch.ones(self.heads, dtype=torch.float32, device="cpu")

    def tile_density(self) -> Tensor:
        return torch.ones(self.heads, dtype=torch.float32, device="cpu")

    def coverage(self, probabilities: Tensor, columns: Tensor) -> Tensor:
        return torch.ones(self.heads, dtype=torch.float32, device=probabilities.device)


@dataclass(frozen=True, eq=False)
class LinePattern(AttentionPattern):
    """Compute vertical lines (key columns) and slash lines (offsets, query minus key), each bool ``[Hq, Tk]``.

    The diagonal, slash 0, is always included. Heads in ``dense_heads`` ``[Hq]`` get every slash, which is every cell. The attribute
    ``dense_heads`` then also marks heads that are dense for another reason. Raises ValueError for shapes that do not fit.
    """

    verticals: Tensor
    slashes: Tensor
    new_tokens: int
    dense_heads: Tensor | None = None

    def __post_init__(self) -> None:
        shape = self.verticals.shape
        if len(shape) != 2 or self.slashes.shape != shape or {self.verticals.dtype, self.slashes.dtype} != {torch.bool}:
            raise ValueError(
                f"LinePattern: verticals {list(shape)} and slashes {list(self.slashes.shape)} must be bool [Hq, Tk]"
            )
        if not 0 < self.new_tokens <= shape[1]:
            raise ValueError(f"LinePattern: new_tokens={self.new_tokens} must lie in [1, {shape[1]}]")
        slashes = self.slashes.clone()
        slashes[:, 0] = True
        if self.dense_heads is not None:
            slashes |= self.dense_heads[:, None]
        object.__setattr__(self, "slashes", slashes)
        object.__setattr__(self, "dense_heads", slashes.all(1))

    @classmethod
    def window(cls, heads: int, new_tokens: int, total_tokens: int, sinks: Tensor, local: int) -> LinePattern:
        """Return the A shape: sink columns (bool ``[Hq, Tk]``), and the last ``local`` columns up to each query's own."""
        slashes = (torch.arange(total_tokens, device=sinks.device) < local).expand(heads, -1)
        return cls(sinks, slashes, new_tokens)

    @property
    def size(self) -> tuple[int, int, int]:
        heads, total = self.verticals.shape
        return heads, self.new_tokens, total

    def rows(self, columns: Tensor) -> Tensor:
        heads, _, total = self.size
        cells = torch.zeros(heads, len(columns), total, dtype=torch.bool, device=self.verticals.device)
        for row, column in enumerate(columns.tolist()):
            cells[:, row, : column + 1] = self.verticals[:, : column + 1] | self.slashes[:, : column + 1].flip(1)
        return cells

    @property
    def reads_blocks(self) -> bool:
        return type(self).attend is LinePattern.attend  # another one knows tensors alone

    def attend(
        self, queries: Tensor, keys: Rows, values: Rows, *, need_lse: bool = False, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        output, lse = vertical_slash(queries, keys, values, self.verticals, self.slashes, **options)
        return output, lse if need_lse else None

    def cell_density(self) -> Tensor:
        return self._cell_density

    @cached_property
    def _cell_density(self) -> Tensor:
        """Count by inclusion and exclusion. Line x is m - max(0, x - p) long. Vertical j and slash d share a cell if p <= j + d <
        n.
        """
        total = self.verticals.shape[1]
        history = total - self.new_tokens
        line = torch.arange(total, device=self.verticals.device)
        lengths = self.new_tokens - (line - history).clamp(min=0)
        separate = ((self.verticals.long() + self.slashes.long()) * lengths).sum(1)
        below = pad(self.slashes.cumsum(1), (1, 0))  # slashes with an offset below x
        crossings = below[:, total - line] - below[:, (history - line).clamp(min=0)]
        shared = (crossings * self.verticals).sum(1)
        return ((separate - shared).double() / self.causal_pairs).float()

    def tile_density(self) -> Tensor:
        return self._tile_density

    @cached_property
    def _tile_density(self) -> Tensor:
        """Count per tile of 64 rows the keys that slashes reach, in tiles, and the verticals among the other keys, packed in tiles."""
        ends = _tile_ends(self.new_tokens, self.verticals.shape[1])
        whole = self.new_tokens // TILE
        tiles = self._tiles_of_lines(TILE, ends[:whole]) + self._tiles_of_lines(self.new_tokens % TILE, ends[whole:])
        return (tiles.double() / sum(-(-end // TILE) for end in ends)).float()

    def _tiles_of_lines(self, height: int, ends: list[int]) -> Tensor:
        """Return the key tiles that row tiles of one height compute, summed over those whose columns end at ``ends``: int64
        ``[Hq]``.
        """
        if not ends:
            return torch.zeros(len(self.verticals), dtype=torch.long, device=self.verticals.device)
        at = torch.tensor(ends, dtype=torch.long, device=self.verticals.device)
        # Counted back from a tile's last column, slash d reaches the keys d to d + height - 1: the same in every tile.
        below = pad(self.slashes.cumsum(1), (height, 0))
        reached = below[:, height:] > below[:, :-height]
        keys = pad(reached.cumsum(1), (1, 0))[:, at]
        packed = self._verticals_among(~reached, at)
        computed: Tensor = -(-keys // TILE) - (-packed // TILE)
        return computed.minimum(-(-at // TILE)).sum(1)

    def _verticals_among(self, offsets: Tensor, ends: Tensor) -> Tensor:
        """Count verticals j whose offset ``end - 1 - j`` is set: ``offsets`` bool ``[Hq, Tk]``, ``ends`` ``[R]``, int64 ``[Hq,
        R]``.
        """
        total = self.verticals.shape[1]
        if offsets.device.type == "cpu":
            # Offsets come in a few runs. The number of verticals in a run is a difference of two running counts.
            edges = pad(offsets.to(torch.int8), (1, 1)).diff(dim=1)
            head, at = edges.nonzero(as_tuple=True)
            before = pad(self.verticals.cumsum(1), (1, 0))  # verticals before column x
            # A run from a to b (exclusive) holds the columns end - b to end - a - 1.
            counts = before[head[:, None], (ends - at[:, None]).clamp(min=0)] * edges[head, at][:, None]
            return torch.zeros(len(offsets), len(ends), dtype=torch.long, device="cpu").index_add_(0, head, counts)
        # A convolution does not wait for the device. Counts are far below 2 ** 52.
        spectrum = torch.fft.rfft(self.verticals.double(), 2 * total) * torch.fft.rfft(offsets.double(), 2 * total)
        counted: Tensor = torch.fft.irfft(spectrum, 2 * total)[:, ends - 1].round().long()
        return counted


@dataclass(frozen=True, eq=False)
class BlockPattern(AttentionPattern):
    """Compute key tiles per query tile: bool ``[Hq, ceil(Tq / tile), ceil(Tk / tile)]``, causal inside.

    Query tiles count from the first new row, key tiles from column 0. The tiles that hold the queries' own columns are always
    included. Raises ValueError for shapes that do not fit.
    """

    blocks: Tensor
    new_tokens: int
    total_tokens: int
    tile: int = TILE

    def __post_init__(self) -> None:
        if not 0 < self.new_tokens <= self.total_tokens or self.tile < 1:
            raise ValueError(
                f"BlockPattern: {self.new_tokens} new of {self.total_tokens} tokens in tiles of {self.tile}"
            )
        wanted = (-(-self.new_tokens // self.tile), -(-self.total_tokens // self.tile))
        if self.blocks.dim() != 3 or self.blocks.shape[1:] != wanted or self.blocks.dtype != torch.bool:
            raise ValueError(
                f"BlockPattern: blocks {list(self.blocks.shape)} must be bool [Hq, {wanted[0]}, {wanted[1]}]"
            )
        blocks = self.blocks.clone()
        own = self._columns()
        blocks[:, (own - own[0]) // self.tile, own // self.tile] = True
        object.__setattr__(self, "blocks", blocks)

    @property
    def size(self) -> tuple[int, int, int]:
        return len(self.blocks), self.new_tokens, self.total_tokens

    def _columns(self) -> Tensor:
        return torch.arange(self.total_tokens - self.new_tokens, self.total_tokens, device=self.blocks.device)

    def rows(self, columns: Tensor) -> Tensor:
        columns = columns.to(self.blocks.device)
        tiles = self.blocks[:, (columns - (self.total_tokens - self.new_tokens)) // self.tile]
        cells = tiles.repeat_interleave(self.tile, dim=2)[:, :, : self.total_tokens]
        return cells & (torch.arange(self.total_tokens, device=columns.device) <= columns[:, None])

    def attend(
        self, queries: Tensor, keys: Tensor, values: Tensor, *, need_lse: bool = False, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        output, lse = block_sparse(queries, keys, values, self.blocks, tile=self.tile, **options)
        return output, lse if need_lse else None

    @cached_property
    def _cells(self) -> Tensor:
        """Return the causal cells of each tile, int64 ``[query tiles, key tiles]``."""
        before = torch.arange(self.blocks.shape[2], device=self.blocks.device) * self.tile
        per_row = (self._columns()[:, None] + 1 - before).clamp(0, self.tile)
        per_row = pad(per_row, (0, 0, 0, -self.new_tokens % self.tile))
        return per_row.view(-1, self.tile, self.blocks.shape[2]).sum(1)

    def cell_density(self) -> Tensor:
        return ((self.blocks * self._cells).sum((1, 2)).double() / self.causal_pairs).float()

    def tile_density(self) -> Tensor:
        causal = self._cells > 0
        return ((self.blocks & causal).sum((1, 2)).double() / causal.sum()).float()


@dataclass(frozen=True, eq=False)
class RowGroups(AttentionPattern):
    """Join patterns of consecutive groups of new rows, first rows first. The keys of each group end at its own last row.

    Raises ValueError unless the groups follow on each other and have the same heads.
    """

    parts: tuple[AttentionPattern, ...]

    def __post_init__(self) -> None:
        if not self.parts:
            raise ValueError("RowGroups: needs at least one group of rows")
        heads, first, seen = self.parts[0].size
        history = seen - first
        for part in self.parts:
            own_heads, new, total = part.size
            if own_heads != heads or total - new != history:
                raise ValueError(
                    f"RowGroups: a group of {part.size} does not follow on {history} columns of {heads} heads"
                )
            history = total

    @property
    def size(self) -> tuple[int, int, int]:
        heads, _, total = self.parts[-1].size
        return heads, sum(part.size[1] for part in self.parts), total

    def rows(self, columns: Tensor) -> Tensor:
        heads, _, total = self.size
        cells = torch.zeros(heads, len(columns), total, dtype=torch.bool, device=columns.device)
        for part in self.parts:
            _, new, seen = part.size
            inside = (columns >= seen - new) & (columns < seen)
            if bool(inside.any()):
                cells[:, inside, :seen] = part.rows(columns[inside]).to(cells.device)
        return cells

    @property
    def reads_blocks(self) -> bool:
        return all(part.reads_blocks for part in self.parts)

    def attend(
        self,
        queries: Tensor,
        keys: Rows,
        values: Rows,
        *,
        need_lse: bool = False,
        **options: Any,
    ) -> tuple[Tensor, Tensor | None]:
        outputs, sums, start = [], [], 0
        for part in self.parts:
            _, new, seen = part.size
            own: tuple[Any, Any] = until(keys, seen), until(values, seen)
            output, lse = part.attend(queries[:, start : start + new], *own, need_lse=need_lse, **options)
            outputs.append(output)
            sums.append(lse)
            start += new
        whole = torch.cat([each for each in sums if each is not None], dim=1) if need_lse else None
        return torch.cat(outputs, dim=1), whole

    def _joined(self, densities: list[Tensor], weights: list[float]) -> Tensor:
        total = sum(weights)
        shares = [density * (weight / total) for density, weight in zip(densities, weights, strict=True)]
        return torch.stack(shares).sum(0)

    def cell_density(self) -> Tensor:
        densities = [part.cell_density().cpu() for part in self.parts]
        return self._joined(densities, [part.causal_pairs for part in self.parts])

    def tile_density(self) -> Tensor:
        """Return the tile density. Tiles of each group are counted from its first row."""
        densities = [part.tile_density().cpu() for part in self.parts]
        return self._joined(densities, [part.causal_pairs for part in self.parts])
