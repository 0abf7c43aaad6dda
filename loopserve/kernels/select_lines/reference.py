"""Select lines by the exact greedy, line by line, and compute what a line costs given those already chosen.

The block has m new rows over n columns, with p = n - m columns of history. Vertical j holds the cells (i, j), slash d
the cells (i, p + i - d). Line x of either kind has m - max(0, x - p) cells. Vertical j and slash d share one cell if p
<= j + d < n, else none.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from loopserve.kernels.line_scores import diagonal_sums

# Share of the mass that counts as 0: sums of float32 probabilities differ from 1 by about this much.
NEGLIGIBLE = 1e-6


def line_lengths(new_tokens: int, total: int, device: torch.device | None = None) -> Tensor:
    """Return the number of cells of line x in the block, float64 ``[n]``."""
    line = torch.arange(total, dtype=torch.float64, device=device)
    return new_tokens - (line - (total - new_tokens)).clamp(min=0)


def cells_added(chosen: Tensor, new_tokens: int) -> Tensor:
    """Return how many cells each line adds to the union of the chosen lines bool ``[H, 2, n]``: float64 ``[H, 2, n]``."""
    total = chosen.shape[2]
    history = total - new_tokens
    below = pad(chosen.flip(1).cumsum(2), (1, 0))  # chosen lines of the other kind before x
    # Line x crosses the others from max(0, p - x) to n - 1 - x.
    upto = below.flip(2)[:, :, :total]
    first = torch.zeros_like(upto)
    first[:, :, :history] = below[:, :, 1 : history + 1].flip(2)
    return line_lengths(new_tokens, total, chosen.device) - (upto - first)


def offsets_computed(slashes: Tensor, tile: int) -> Tensor:
    """Return which offsets a tile of rows computes for chosen slashes bool ``[..., n]``: bool ``[..., n + tile - 1]``.

    Entry o is the key column o - (tile - 1) before the first row of the tile. Slash d needs the entries d to d + tile -
    1.
    """
    below = pad(pad(slashes, (0, tile - 1)).cumsum(-1), (tile, 0))  # slashes up to and including entry o - tile
    return below[..., tile:] > below[..., :-tile]


def keys_added(chosen: Tensor, new_tokens: int, tile: int) -> Tensor:
    """Return how many additional keys per tile, averaged over the block, a kernel computes for each line: float64 ``[H,
    2, n]``.
    """
    total = chosen.shape[2]
    lengths = line_lengths(new_tokens, total, chosen.device) / new_tokens
    span = torch.cat([torch.ones(tile - 1, dtype=lengths.dtype, device=chosen.device), lengths])
    missing = pad((span * ~offsets_computed(chosen[:, 1], tile)).cumsum(-1), (1, 0))
    slash = missing[:, tile:] - missing[:, :-tile]
    # Rounding leaves sums that should be 0 slightly off. A real cost is at least one row of one key.
    slash = slash.masked_fill(slash < 0.5 / new_tokens, 0.0)
    return torch.stack([lengths.expand_as(slash), slash], dim=1)


def total_cost(chosen: Tensor, new_tokens: int, tile: int | None) -> Tensor:
    """Return the cost float64 ``[H]`` of the chosen lines ``[H, 2, n]``: cells of their union, or keys per tile if
    ``tile`` is given.
    """
    total = chosen.shape[2]
    lengths = line_lengths(new_tokens, total, chosen.device)
    if tile is None:
        slashes_only = torch.stack([torch.zeros_like(chosen[:, 0]), chosen[:, 1]], dim=1)
        added = cells_added(slashes_only, new_tokens)[:, 0]
        return (chosen[:, 1] * lengths).sum(-1) + (chosen[:, 0] * added).sum(-1)
    lengths = lengths / new_tokens
    span = torch.cat([torch.ones(tile - 1, dtype=lengths.dtype, device=chosen.device), lengths])
    return (chosen[:, 0] * lengths).sum(-1) + (offsets_computed(chosen[:, 1], tile) * span).sum(-1)


def least_rates(least_weight: float, row_weights: Tensor, new_tokens: int, tile: int | None) -> Tensor:
    """Return the gain per cost float64 ``[H]`` of a line whose added cells hold ``least_weight`` each, mean over rows weighed
    by ``row_weights`` ``[H, r]``.
    """
    # A line over the whole block costs 1 key per tile, or as many cells as the block has rows.
    return least_weight * row_weights.double().sum(1) / (1 if tile is not None else new_tokens)


def select_lines_reference(
    probabilities: Tensor,
    columns: Tensor,
    new_tokens: int,
    *,
    alpha: float,
    tile: int | None,
    row_weights: Tensor,
    row_floor: float,
    most_cost: float,
    least_weight: float,
    forced: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return chosen lines bool ``[Hq, 2, n]``, covered and total mass per row ``[Hq, r]``, cost ``[Hq]``; kind 0 is
    vertical, 1 slash.

    See the operation.
    """
    heads = []
    rates = least_rates(least_weight, row_weights, new_tokens, tile).tolist()
    finite = probabilities.double().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    for mass, weights, lines, rate in zip(finite, row_weights.double(), forced, rates, strict=True):
        head = _Head(mass, columns, new_tokens, tile, most_cost)
        for kind, line in lines.nonzero().tolist():
            head.take(kind, line)
        head.cover(weights, alpha, rate)
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

    def cover(self, weights: Tensor, share: float, rate: float) -> None:
        """Take lines until the weighted covered mass reaches its share, or no line gains at least ``rate`` per cost."""
        self._weigh(weights)
        whole = float(self.mass @ weights)
        while (missing := (share - NEGLIGIBLE) * whole - float(self.covered @ weights)) > 0:
            if not self._take_best(missing, rate):
                return

    def lift_rows(self, floor: float) -> None:
        """Take lines until each row reaches its share. Only rows still below it count for the gains."""
        while True:
            below = self.covered < (floor - NEGLIGIBLE) * self.mass
            if not torch.equal(below.double(), self.weights):
                self._weigh(below.double())
            if not bool(below.any()) or not self._take_best():
                return

    def _take_best(self, missing: float = 0.0, rate: float = 0.0) -> bool:
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
        if not bool(possible.any()) or float(ratios.flatten()[best]) < rate:
            return False
        spent = float(total_cost(chosen, self.new_tokens, self.tile)) if self.most_cost < math.inf else 0.0
        if spent + missing / float(ratios.flatten()[best]) > self.most_cost:  # no later line has a higher gain per cost
            return False
        self.take(*divmod(best, ratios.shape[1]))
        return True
