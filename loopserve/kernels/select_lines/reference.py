"""Select lines by the exact greedy, line by line; the other implementations are compared with it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from loopserve.kernels.line_scores.torch import diagonal_sums
from loopserve.kernels.select_lines.geometry import cells_added, keys_added, total_cost

# Share of the mass that counts as 0: sums of float32 probabilities differ from 1 by about this much.
NEGLIGIBLE = 1e-6


def select_lines(
    probabilities: Tensor,
    columns: Tensor,
    new_tokens: int,
    *,
    alpha: float,
    tile: int | None,
    row_weights: Tensor,
    row_floor: float,
    most_cost: float,
    forced: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return chosen lines bool ``[Hq, 2, n]``, covered and total mass per row ``[Hq, r]``, cost ``[Hq]``; kind 0 is
    vertical, 1 slash.

    See the package.
    """
    heads = []
    finite = probabilities.double().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    for mass, weights, lines in zip(finite, row_weights.double(), forced, strict=True):
        head = _Head(mass, columns, new_tokens, tile, most_cost)
        for kind, line in lines.nonzero().tolist():
            head.take(kind, line)
        head.cover(weights, alpha)
        head.lift_rows(row_floor)
        heads.append(head)
    chosen, covered = torch.stack([head.chosen for head in heads]), torch.stack([head.covered for head in heads])
    return chosen, covered, torch.stack([head.mass for head in heads]), total_cost(chosen, new_tokens, tile)


class _Head:
    """Hold the state of one head: uncovered mass ``[r, n]``, its weighted sums along the lines ``[2, n]``, chosen
    lines, covered mass ``[r]``.
    """

    def __init__(self, mass: Tensor, columns: Tensor, new_tokens: int, tile: int | None, most_cost: float) -> None:
        self.residual = mass.clone()
        self.mass = mass.sum(-1)
        self.columns, self.new_tokens, self.tile = columns, new_tokens, tile
        self.most_cost = most_cost
        self.chosen = torch.zeros(2, mass.shape[1], dtype=torch.bool, device=mass.device)
        self.covered = torch.zeros_like(self.mass)
        self._weigh(torch.ones_like(self.mass))

    def _weigh(self, weights: Tensor) -> None:
        self.weights = weights
        weighted = self.residual * weights[:, None]
        self.gains = torch.stack([weighted.sum(0), diagonal_sums(weighted[None], self.columns)[0]])

    def take(self, kind: int, line: int) -> None:
        """Add a line to the union: cover its mass and reduce the gains of the lines that cross it."""
        self.chosen[kind, line] = True
        rows = (self.columns >= line).nonzero().flatten()
        crossing = self.columns[rows] - line
        places = torch.full_like(rows, line) if kind == 0 else crossing
        mass = self.residual[rows, places]
        self.covered[rows] += mass
        self.residual[rows, places] = 0.0
        self.gains[1 - kind].index_add_(0, crossing, -mass * self.weights[rows])

    def cover(self, weights: Tensor, share: float) -> None:
        """Take lines until the weighted covered mass reaches its share, or no line has a gain."""
        self._weigh(weights)
        whole = float(self.mass @ weights)
        while (missing := (share - NEGLIGIBLE) * whole - float(self.covered @ weights)) > 0:
            if not self._take_best(missing):
                return

    def lift_rows(self, floor: float) -> None:
        """Take lines until each row reaches its share. Only rows still below it count for the gains."""
        while True:
            below = self.covered < (floor - NEGLIGIBLE) * self.mass
            if not torch.equal(below.double(), self.weights):
                self._weigh(below.double())
            if not bool(below.any()) or not self._take_best():
                return

    def _take_best(self, missing: float = 0.0) -> bool:
        chosen = self.chosen[None]
        costs = (
            cells_added(chosen, self.new_tokens)
            if self.tile is None
            else keys_added(chosen, self.new_tokens, self.tile)
        )
        # A line may cost 0: the kernel computes its keys already, and masks them.
        possible = (self.gains > 1e-12 * float(self.weights.max())) & ~self.chosen
        ratios = torch.where(possible, self.gains / costs[0], -1.0)
        best = int(ratios.argmax())  # ties: a vertical before a slash, then the lower index
        if not bool(possible.any()):
            return False
        spent = float(total_cost(chosen, self.new_tokens, self.tile)) if self.most_cost < math.inf else 0.0
        if spent + missing / float(ratios.flatten()[best]) > self.most_cost:  # no later line has a higher gain per cost
            return False
        self.take(*divmod(best, ratios.shape[1]))
        return True
