"""The exact greedy, line by line: readable, and what the fast one is measured against."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

TILE = 64
_REACHED = 1e-6  # float sums of a row's probabilities miss 1 by about this much

Floats = NDArray[np.float64]


def line_lengths(new_tokens: int, total: int) -> Floats:
    """Cells of each line in the block of the last ``new_tokens`` rows: the same for vertical x and slash x."""
    history = total - new_tokens
    return new_tokens - np.maximum(0, np.arange(total) - history).astype(np.float64)


@dataclass
class Greedy:
    """One head. ``residual`` holds the mass not covered yet, ``vertical`` and ``slash`` its sums along the lines."""

    residual: Floats  # [r, n]
    columns: NDArray[np.int64]
    new_tokens: int
    by_tile: bool

    def __post_init__(self) -> None:
        total = self.residual.shape[1]
        self.lengths = line_lengths(self.new_tokens, total)
        self.chosen = np.zeros((2, total), dtype=bool)  # verticals, slashes
        self.cells_left = np.stack([self.lengths, self.lengths])  # cells a line would add to the union
        self.computed = np.zeros(total + TILE - 1, dtype=bool)  # offsets -63 .. n-1 inside the tiles of chosen slashes
        self.keys_left = np.full(total, float(TILE))  # keys a slash would add to a row tile
        self.covered = np.zeros(len(self.columns))

    def sums(self) -> Floats:
        """Uncovered mass on each line: ``[2, n]``."""
        total = self.residual.shape[1]
        slash = np.zeros(total)
        for row, column in zip(self.residual, self.columns, strict=True):
            slash[: column + 1] += row[column::-1]
        return np.stack([self.residual.sum(0), slash])

    def costs(self) -> Floats:
        if self.by_tile:
            return np.stack([self.lengths, self.lengths * self.keys_left])
        return np.maximum(self.cells_left, 1.0)

    def take(self, kind: int, line: int) -> None:
        """Add a vertical (kind 0) or slash (1) to the union."""
        total = self.residual.shape[1]
        self.chosen[kind, line] = True
        rows = np.nonzero(self.columns >= line)[0]
        places = np.full(len(rows), line) if kind == 0 else self.columns[rows] - line
        self.covered[rows] += self.residual[rows, places]
        self.residual[rows, places] = 0.0
        # Vertical j and slash d share one cell of the block if history <= j + d < total.
        first = max(total - self.new_tokens - line, 0)
        self.cells_left[1 - kind, first : total - line] -= 1
        if kind == 1:
            self.computed[line : line + TILE] = True
            missing = np.concatenate([[0], np.cumsum(~self.computed)])
            self.keys_left = (missing[TILE:] - missing[:-TILE]).astype(np.float64)

    def run(self, weights: Floats, alpha: float, floor: float) -> None:
        """Take lines until the weighted mass reaches alpha, then until every row reaches its floor."""
        self._until(weights, alpha * weights.sum() - _REACHED)
        while True:
            low = self.covered < floor - _REACHED
            if not low.any():
                return
            # A row is done at its floor: only rows below it say what is gained.
            before = self.covered.sum()
            self._take_best(low.astype(np.float64))
            if self.covered.sum() <= before:
                return

    def _until(self, weights: Floats, wanted: float) -> None:
        while float(self.covered @ weights) < wanted:
            before = self.covered.sum()
            self._take_best(weights)
            if self.covered.sum() <= before:  # nothing left to gain
                return

    def _take_best(self, weights: Floats) -> None:
        kept, self.residual = self.residual, self.residual * weights[:, None]
        gains = self.sums()
        self.residual = kept
        costs = self.costs()
        ratios = np.divide(gains, costs, out=np.where(gains > 0, np.inf, 0.0), where=costs > 0)
        ratios[self.chosen] = -1.0
        kind, line = divmod(int(ratios.argmax()), ratios.shape[1])  # the first of equals: vertical, then lower index
        self.take(kind, line)


def select_lines(
    probabilities: Tensor,
    columns: Tensor,
    new_tokens: int,
    *,
    alpha: float,
    cost: str,
    row_weights: Tensor,
    row_floor: float,
    forced_verticals: Tensor,
    forced_slashes: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """See the package."""
    weights = row_weights.double().cpu().numpy()
    chosen, coverage = [], []
    for head, probability in enumerate(probabilities.double().cpu().numpy()):
        greedy = Greedy(probability.copy(), columns.cpu().numpy(), new_tokens, cost == "tile")
        for kind, forced in enumerate((forced_verticals, forced_slashes)):
            for line in forced[head].nonzero().flatten().tolist():
                greedy.take(kind, line)
        greedy.run(weights, alpha, row_floor)
        chosen.append(greedy.chosen)
        coverage.append(float(greedy.covered @ weights) / max(float(weights.sum()), 1e-30))
    lines = torch.from_numpy(np.stack(chosen)).to(probabilities.device)
    return lines[:, 0], lines[:, 1], torch.tensor(coverage, device=probabilities.device)
