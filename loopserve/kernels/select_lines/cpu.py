"""The greedy in batches: every head at once, several nearly equal lines per round, sums corrected only where lines cross.

A round takes the lines whose gain per cost is close to the best, but never more than what is still missing, so the result
overshoots by at most one line, as the line-by-line greedy does.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from loopserve.kernels.line_scores.reference import slash_mass
from loopserve.kernels.select_lines.reference import TILE

_CLOSE = 0.9  # share of the best gain per cost that still joins a round
_CHEAP_KEYS = (
    8.0  # under tile cost, slashes that add more keys than this are taken one per round: each changes its neighbours
)
_REACHED = 1e-5


class _Heads:
    """All heads' state. ``residual`` ``[H, r, n]``; ``gains`` and ``cells_left`` ``[H, 2, n]`` for verticals and slashes."""

    def __init__(self, probabilities: Tensor, columns: Tensor, new_tokens: int, by_tile: bool, weights: Tensor) -> None:
        heads, _, total = probabilities.shape
        self.by_tile, self.columns, self.weights = by_tile, columns, weights
        self.history = total - new_tokens
        self.residual = probabilities.clone()
        self.line = torch.arange(total, device=probabilities.device)
        self.lengths = (new_tokens - (self.line - self.history).clamp(min=0)).to(probabilities.dtype)
        self.cells_left = self.lengths.expand(heads, 2, total).clone()
        self.computed = torch.zeros(heads, total + TILE - 1, dtype=torch.bool, device=probabilities.device)
        self.keys_left = probabilities.new_full((heads, total), float(TILE))
        self.chosen = torch.zeros(heads, 2, total, dtype=torch.bool, device=probabilities.device)
        self.covered = probabilities.new_zeros(heads, len(columns))
        self.weigh(weights.expand(heads, -1))

    def weigh(self, weights: Tensor) -> None:
        """Gains under row weights ``[H, r]``, from the residual."""
        self.row_weights = weights
        weighted = self.residual * weights[..., None]
        self.gains = torch.stack([weighted.sum(1), slash_mass(weighted, self.columns)], dim=1)

    def costs(self) -> Tensor:
        if self.by_tile:
            return torch.stack([self.lengths.expand_as(self.keys_left), self.lengths * self.keys_left], dim=1)
        return self.cells_left.clamp(min=1.0)

    def take(self, chosen: Tensor) -> None:
        """Add lines, bool ``[H, 2, n]``, to the union; verticals first, so a crossing is counted once."""
        self.chosen |= chosen
        for kind in (0, 1):
            heads, lines = chosen[:, kind].nonzero(as_tuple=True)
            if len(heads):
                self._cover(kind, heads, lines)
                self._charge(kind, heads, lines)

    def _cover(self, kind: int, heads: Tensor, lines: Tensor) -> None:
        crossing = self.columns - lines[:, None]  # [K, r]: the other kind's line through the same cell
        seen = crossing >= 0
        places = lines[:, None].expand_as(crossing) if kind == 0 else crossing.clamp(min=0)
        rows = torch.arange(len(self.columns), device=lines.device).expand_as(crossing)
        heads = heads[:, None].expand_as(crossing)
        mass = self.residual[heads, rows, places].masked_fill(~seen, 0.0)
        self.residual[heads[seen], rows[seen], places[seen]] = 0.0
        self.covered.index_put_((heads, rows), mass, accumulate=True)
        gone = mass * self.row_weights[heads, rows]
        other = crossing.clamp(min=0)
        flat = (heads * 2 + (1 - kind)) * self.gains.shape[2] + other
        self.gains.view(-1).index_add_(0, flat.flatten(), -gone.flatten())
        own = (heads[:, 0] * 2 + kind) * self.gains.shape[2] + lines
        self.gains.view(-1)[own] = 0.0

    def _charge(self, kind: int, heads: Tensor, lines: Tensor) -> None:
        total = self.gains.shape[2]
        if self.by_tile:
            if kind == 1:
                reach = torch.arange(TILE, device=lines.device)
                self.computed[heads[:, None], lines[:, None] + reach] = True
                missing = pad((~self.computed).int().cumsum(1), (1, 0))
                self.keys_left = (missing[:, TILE:] - missing[:, :-TILE]).to(self.gains.dtype)
            return
        steps = torch.zeros(len(self.chosen), total + 1, device=lines.device)
        one = torch.ones(len(lines), device=lines.device)
        steps.index_put_((heads, (self.history - lines).clamp(min=0)), one, accumulate=True)
        steps.index_put_((heads, total - lines), -one, accumulate=True)
        self.cells_left[:, 1 - kind] -= steps.cumsum(1)[:, :total]

    def round(self, missing: Tensor) -> Tensor:
        """The lines to take now, bool ``[H, 2, n]``, given the weighted mass still missing ``[H]`` (0 = the head is done)."""
        costs = self.costs()
        gains = self.gains.masked_fill(self.chosen | (self.gains <= 1e-9), 0.0)
        ratios = torch.where(costs > 0, gains / costs.clamp(min=1e-9), gains * 1e9)
        ratios[missing <= 0] = 0.0
        flat = ratios.flatten(1)
        best, first = flat.max(1)
        close = (ratios >= _CLOSE * best[:, None, None]) & (ratios > 0)
        if self.by_tile:
            close[:, 1] &= self.keys_left <= _CHEAP_KEYS
        close = close.flatten(1)
        close[torch.arange(len(best)), first] |= best > 0
        flat_gains = gains.flatten(1)
        if bool(((flat_gains * close).sum(1) < missing).logical_or(missing <= 0).all()):
            return close.view_as(ratios)  # no head would overshoot: nothing to rank
        order = flat.masked_fill(~close, -1.0).topk(int(close.sum(1).max()), dim=1).indices
        before = flat_gains.gather(1, order).cumsum(1)
        before = pad(before[:, :-1], (1, 0))  # gained by the better ones of this round
        fits = (before < missing[:, None]) & close.gather(1, order)
        return torch.zeros_like(close).scatter_(1, order, fits).view_as(ratios)


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
    state = _Heads(probabilities.float(), columns, new_tokens, cost == "tile", row_weights.float())
    state.take(torch.stack([forced_verticals, forced_slashes], dim=1))
    weight = float(row_weights.sum())
    while True:
        missing = alpha * weight - _REACHED * weight - state.covered @ state.weights
        chosen = state.round(missing)
        if not bool(chosen.any()):
            break
        state.take(chosen)
    while row_floor > 0:
        low = (state.covered < row_floor - _REACHED).float()
        state.weigh(low)
        missing = (low * (row_floor - state.covered)).sum(1)
        chosen = state.round(missing)
        if not bool(chosen.any()):
            break
        state.take(chosen)
    coverage = state.covered @ state.weights / max(weight, 1e-30)
    return state.chosen[:, 0], state.chosen[:, 1], coverage
