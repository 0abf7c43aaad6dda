"""Join patterns of consecutive groups of new rows into one pattern."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from loopserve.core.policy.patterns import AttentionPattern


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

    def attend(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        *,
        need_lse: bool = False,
        **options: Any,
    ) -> tuple[Tensor, Tensor | None]:
        outputs, sums, start = [], [], 0
        for part in self.parts:
            _, new, seen = part.size
            output, lse = part.attend(
                queries[:, start : start + new], keys[:, :seen], values[:, :seen], need_lse=need_lse, **options
            )
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
