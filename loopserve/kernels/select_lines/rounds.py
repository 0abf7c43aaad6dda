"""Select lines greedily in rounds: all heads at once, several nearly equal lines per round.

A round takes lines whose gain per cost is close to the best. Within a round they are counted in order, each without the
cells of those before it. So coverage is exact, and the last round ends at the line that reaches the target. Masses are
corrected only where lines cross.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from loopserve.kernels.line_scores import diagonal_sums
from loopserve.kernels.select_lines.reference import NEGLIGIBLE, cells_added, keys_added, least_rates, total_cost

_CLOSE = 0.8  # share of the best gain per cost that joins a round ...
_CLOSE_FAR = 0.5  # ... while more than _FAR of the mass is missing and the order matters less
_FAR = 0.1
_SHARE = 0.7  # share of the missing mass that the lines of a round may claim
_UNRANKED = torch.iinfo(torch.int32).max


def select_lines_torch(
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
    state = _Heads(probabilities, columns, new_tokens, tile, most_cost)
    state.weigh(row_weights.float())
    state.take_all(forced)
    state.least_rate = least_rates(least_weight, row_weights, new_tokens, tile).float()
    whole = (state.mass * state.weights).sum(1)
    while state.round((alpha - NEGLIGIBLE) * whole - (state.covered * state.weights).sum(1), whole):
        pass
    state.least_rate.zero_()  # a row must reach its floor, whatever its lines hold
    while row_floor > 0:
        wanted = (row_floor - NEGLIGIBLE) * state.mass
        below = (state.covered < wanted).float()
        if not torch.equal(below, state.weights):
            state.weigh(below)
        # Rows reach their floor one by one. The smallest gap bounds the mass of a round, so that no row ends far above its
        # floor.
        gap = torch.where(below > 0, wanted - state.covered, torch.inf).amin(1)
        if not state.round(gap.masked_fill(gap.isinf(), 0.0) * below.sum(1), (state.mass * below).sum(1)):
            break
    return state.chosen, state.covered, state.mass, total_cost(state.chosen, new_tokens, tile)


@dataclass(frozen=True)
class _Batch:
    """Hold K lines in the order they are taken, head after head, and the uncovered mass ``[K, r]`` of each."""

    heads: Tensor
    kinds: Tensor
    lines: Tensor
    cells: Tensor  # [K, r]: flat indices into the residual
    met: Tensor  # [K, r]: flat index, among the lines, of the line of the other kind through the same cell
    held: Tensor  # [K, r]: uncovered mass of the cells
    mass: Tensor  # [K, r]: the same without cells of earlier lines

    def __getitem__(self, which: Tensor) -> _Batch:
        kept = which.nonzero().flatten()  # computed once for seven indexings
        return _Batch(*(getattr(self, each.name).index_select(0, kept) for each in fields(self)))


class _Heads:
    """Hold the state of all heads: uncovered mass ``[H, r, n]``, weighted sums along the lines ``[H, 2, n]``, chosen
    lines, covered mass ``[H, r]``.
    """

    def __init__(
        self, probabilities: Tensor, columns: Tensor, new_tokens: int, tile: int | None, most_cost: float
    ) -> None:
        heads, _, total = probabilities.shape
        self.residual = probabilities.float().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
        self.mass = self.residual.sum(-1)
        self.columns, self.new_tokens, self.tile = columns, new_tokens, tile
        self.most_cost = most_cost
        self.least_rate = torch.zeros(heads, dtype=torch.float32, device=probabilities.device)
        self.chosen = torch.zeros(heads, 2, total, dtype=torch.bool, device=probabilities.device)
        self.covered = torch.zeros_like(self.mass)
        self._ranks = torch.full(self.chosen.shape, _UNRANKED, dtype=torch.int32, device=probabilities.device)
        self._summed_anew = False  # no line had a gain, and none has been taken since
        self._price()

    def weigh(self, weights: Tensor) -> None:
        """Recompute the gains from the residual under row weights ``[H, r]``."""
        self.weights = weights
        weighted = self.residual * weights[..., None]
        self.gains = torch.stack([weighted.sum(1), diagonal_sums(weighted, self.columns)], dim=1)
        self._fresh = True

    def _price(self) -> None:
        if self.tile is None:
            self.costs = cells_added(self.chosen, self.new_tokens).float()
        else:
            self.costs = keys_added(self.chosen, self.new_tokens, self.tile).float()

    def take_all(self, lines: Tensor) -> None:
        """Take the lines bool ``[H, 2, n]``, whatever their gain."""
        if bool(lines.any()):
            self._take(self._batch(*lines.nonzero(as_tuple=True)))
            self._price()

    def round(self, missing: Tensor, whole: Tensor) -> bool:
        """Take the best lines of each head for its missing mass ``[H]`` (of ``whole``).

        Return False if no line has a gain.

        In each round the best line of some head is taken, or found to have no gain and excluded. Only recomputed gains
        include a line again, and they are recomputed only after a line was taken. So the rounds end for all inputs.
        """
        open_heads = missing > 0
        if not bool(open_heads.any()):
            return False
        # Corrected sums drift by rounding. A gain below the drift is not used until the sums are recomputed.
        least = 0.0 if self._fresh else NEGLIGIBLE * self.weights.amax(1)[:, None, None]
        possible = (self.gains > least) & ~self.chosen & open_heads[:, None, None]
        ratios = (self.gains / self.costs).masked_fill_(~possible, 0.0)
        ratios.masked_fill_(ratios < self.least_rate[:, None, None], 0.0)
        if (
            self.most_cost < math.inf
        ):  # heads whose target costs too much stop: no later line has a higher gain per cost
            needed = total_cost(self.chosen, self.new_tokens, self.tile) + missing.clamp(min=0) / ratios.amax((1, 2))
            ratios = ratios.masked_fill((needed > self.most_cost)[:, None, None], 0.0)
        possible &= ratios > 0  # unless the gain is so small that its share of the cost is 0
        if not bool(possible.any()):
            if self._fresh or self._summed_anew or self.most_cost < math.inf:
                return False
            self.weigh(self.weights)
            self._summed_anew = True
            return True
        batch = self._cut(*self._candidates(ratios, missing, whole), missing)
        self._summed_anew = self._summed_anew and len(batch.lines) == 0
        self._take(batch)
        self._price()
        return True

    def _candidates(self, ratios: Tensor, missing: Tensor, whole: Tensor) -> tuple[_Batch, Tensor]:
        """Return the lines to try in this round, best first, and the gain per cost ``[H]`` that they must reach."""
        paid = ratios.masked_fill(ratios.isinf(), 0.0).amax((1, 2))
        close = torch.where(missing > _FAR * whole, _CLOSE_FAR * paid, _CLOSE * paid).maximum(self.least_rate)
        heads, kinds, lines = ((ratios >= close[:, None, None]) & (ratios > 0)).nonzero(as_tuple=True)
        value = ratios[heads, kinds, lines]
        order = value.argsort(descending=True, stable=True)
        order = order[heads[order].argsort(stable=True)]
        heads, kinds, lines = heads[order], kinds[order], lines[order]
        before = _running(self.gains[heads, kinds, lines].double(), heads) - self.gains[heads, kinds, lines]
        fits = _first_of_head(heads) | (before < _SHARE * missing[heads])
        return self._batch(heads[fits], kinds[fits], lines[fits]), close

    def _batch(self, heads: Tensor, kinds: Tensor, lines: Tensor) -> _Batch:
        rows, total = self.residual.shape[1:]
        crossing = self.columns - lines[:, None]
        # A slash beyond a row is mapped to the last column, which lies after the row and holds no mass.
        other = torch.where(crossing >= 0, crossing, total - 1)
        places = torch.where(kinds[:, None] == 0, lines[:, None], other)
        cells = (heads[:, None] * rows + torch.arange(rows, device=lines.device)) * total + places
        met = (heads * 2 + 1 - kinds)[:, None] * total + other
        held = _at(self.residual, cells)
        return self._share_out(_Batch(heads, kinds, lines, cells, met, held, held))

    def _share_out(self, batch: _Batch) -> _Batch:
        """Assign a cell on two lines of the batch to the line that comes first."""
        own = (batch.heads, batch.kinds, batch.lines)
        rank = torch.arange(len(batch.lines), dtype=torch.int32, device=batch.lines.device)
        self._ranks[own] = rank
        first = _at(self._ranks, batch.met) > rank[:, None]
        self._ranks[own] = _UNRANKED
        return replace(batch, mass=batch.held * first)

    def _gained(self, batch: _Batch) -> Tensor:
        return (batch.mass * self.weights[batch.heads]).sum(1)

    def _cut(self, batch: _Batch, close: Tensor, missing: Tensor) -> _Batch:
        """Remove lines whose gain is too small after those before them, and lines after the target of their head is
        reached.
        """
        ratios = self._gained(batch) / self.costs[batch.heads, batch.kinds, batch.lines]
        enough = _first_of_head(batch.heads) | (ratios >= close[batch.heads])
        if not bool(enough.all()):
            batch = self._share_out(batch[enough])
        gained = self._gained(batch)
        empty = ~(gained > 0)  # excludes NaN, which would be tried in every round
        self.gains[batch.heads[empty], batch.kinds[empty], batch.lines[empty]] = 0.0
        before = _running(gained.double(), batch.heads) - gained
        # One running sum covers all heads. After a much heavier head, rounding may add mass before the first line of a head.
        return batch[(_first_of_head(batch.heads) | (before < missing[batch.heads])) & ~empty]

    def _take(self, batch: _Batch) -> None:
        self.chosen[batch.heads, batch.kinds, batch.lines] = True
        self.covered.index_add_(0, batch.heads, batch.mass)
        self.residual.view(-1).index_fill_(0, batch.cells.flatten(), 0.0)
        gone = batch.mass * self.weights[batch.heads]
        self.gains.view(-1).index_add_(0, batch.met.flatten(), gone.flatten(), alpha=-1.0)
        self._fresh = False


def _at(values: Tensor, places: Tensor) -> Tensor:
    """Return values at flat indices of any shape: ``index_select`` is four times faster than indexing."""
    return values.view(-1).index_select(0, places.view(-1)).view_as(places)


def _first_of_head(heads: Tensor) -> Tensor:
    """Return where the next head begins; ``heads`` ascend."""
    first = torch.ones_like(heads, dtype=torch.bool)
    first[1:] = heads[1:] != heads[:-1]
    return first


def _running(values: Tensor, heads: Tensor) -> Tensor:
    """Return running sums that restart with each head; ``heads`` ascend."""
    sums = values.cumsum(0)
    start = torch.searchsorted(heads, heads)
    return sums - (sums - values)[start]
