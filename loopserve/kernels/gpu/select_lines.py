"""Select lines greedily on a GPU without synchronising: a fixed number of rounds, all heads at once.

A round ranks the lines whose gain per cost is close to the best, counts each without the cells of those before it, and
takes them up to the target. The gains of the lines that cross them are then reduced. The probabilities are never
changed: a cell is uncovered while neither of its lines is taken. Heads that reached the target skip later rounds.

If a head has not reached its target after the last round, all remaining lines are ranked once and counted the same way.
So the target is always reached, at a slightly higher cost.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from loopserve.kernels.gpu.lines import FREE, TAKEN, covered_masses, line_masses, take_lines
from loopserve.kernels.gpu.scores import line_scores
from loopserve.kernels.select_lines.reference import NEGLIGIBLE, cells_added, keys_added, least_rates, total_cost

ROUNDS = 16
_LINES = 1024  # per head and round
_CLOSE = 0.8  # share of the best gain per cost that joins a round ...
_CLOSE_FAR = 0.5  # ... and while more than _FAR of the mass is missing
_FAR = 0.1
_SHARE = 0.7  # share of the missing mass that the lines of a round may claim


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
    least_weight: float,
    forced: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return chosen lines bool ``[Hq, 2, n]``, covered and total mass per row ``[Hq, r]``, cost ``[Hq]``; kind 0 is
    vertical, 1 slash.

    See the operation.
    """
    heads = _Heads(probabilities, columns, new_tokens, alpha, tile, row_weights, least_weight, forced)
    for _ in range(ROUNDS):
        heads.round()
    heads.complete()
    chosen = heads.chosen.view(forced.shape)
    covered = covered_masses(heads.mass, heads.columns, heads.ranks)
    return chosen, covered, heads.row_mass, total_cost(chosen, new_tokens, tile)


class _Heads:
    """Hold the state of all heads: ranks int32, gains, chosen ``[H, 2 * n]``; missing weighted mass ``[H]``."""

    def __init__(
        self,
        probabilities: Tensor,
        columns: Tensor,
        new_tokens: int,
        alpha: float,
        tile: int | None,
        row_weights: Tensor,
        least_weight: float,
        forced: Tensor,
    ) -> None:
        self.mass, self.columns = probabilities.float().contiguous(), columns.contiguous()
        self.new_tokens, self.tile = new_tokens, tile
        self.weights = row_weights.float().contiguous()
        self.chosen = forced.reshape(len(forced), -1).clone()
        free = torch.full(self.chosen.shape, FREE, dtype=torch.int32, device=forced.device)
        self.ranks = free.masked_fill_(self.chosen, TAKEN)
        self.gains = line_masses(self.mass, self.columns, weights=self.weights, ranks=self.ranks)
        # By the kernel, which counts values that are not finite as 0.
        self.row_mass = covered_masses(self.mass, self.columns, torch.full_like(free, TAKEN))
        self.whole = (self.row_mass * self.weights).sum(1)
        # Every uncovered cell is on one vertical.
        uncovered = self.gains[:, : forced.shape[2]].sum(1)
        self.missing = uncovered - (1.0 - alpha + NEGLIGIBLE) * self.whole
        self.least_rate = least_rates(least_weight, self.weights, new_tokens, tile).float()[:, None]
        self.least = NEGLIGIBLE * self.weights.amax(
            1, keepdim=True
        )  # corrected sums drift by rounding; smaller gains are noise

    def _costs(self) -> Tensor:
        chosen = self.chosen.view(len(self.chosen), 2, -1)
        tile = self.tile
        added = cells_added(chosen, self.new_tokens) if tile is None else keys_added(chosen, self.new_tokens, tile)
        return added.float().view(self.chosen.shape)

    def round(self) -> None:
        """Take the best lines of each head below its target."""
        costs = self._costs()
        possible = (self.gains > self.least) & ~self.chosen & (self.missing > 0)[:, None]
        ratios = (self.gains / costs).masked_fill_(~possible, 0.0)
        ratios.masked_fill_(ratios < self.least_rate, 0.0)
        best, lines = ratios.topk(min(_LINES, ratios.shape[1]), dim=1)
        paid = ratios.masked_fill_(ratios.isinf(), 0.0).amax(1)
        near = self.missing <= _FAR * self.whole
        close = torch.where(near, _CLOSE * paid, _CLOSE_FAR * paid)[:, None].maximum(self.least_rate)
        expected = self.gains.gather(1, lines).masked_fill_(best <= 0, 0.0)
        fits = _before(expected) < _SHARE * self.missing[:, None]
        fits[:, 0].fill_(True)
        tried = (best > 0) & (best >= close) & fits
        gained = self._ranked(lines, tried)
        # The gain left by earlier lines may be below the threshold. The first line always reaches it.
        enough = gained >= close * costs.gather(1, lines)
        enough[:, 0].fill_(True)
        tried &= enough
        gained = self._ranked(lines, tried)
        empty = tried & (gained <= 0)
        self.gains.scatter_(1, lines, self.gains.gather(1, lines).masked_fill_(empty, 0.0))
        taken = tried & ~empty & (_before(gained) < self.missing[:, None])
        take_lines(self.mass, self.columns, self.weights, self.ranks, lines.masked_fill(~taken, -1).int(), self.gains)
        self._settle(lines, taken, gained)

    def complete(self) -> None:
        """Rank all remaining lines, and take them up to the target."""
        costs = self._costs()
        ratios = (self.gains / costs).masked_fill_(self.chosen, -torch.inf)
        order = ratios.nan_to_num_(nan=0.0, posinf=torch.inf, neginf=-torch.inf).argsort(dim=1, descending=True)
        rank = torch.arange(order.shape[1], dtype=torch.int32, device=order.device).expand_as(order)
        # A line below the least rate is not taken, so it claims no cell.
        below = (ratios < self.least_rate) & (self.least_rate > 0)
        rank = rank.masked_fill(below.gather(1, order), FREE)
        self.ranks = torch.empty_like(self.ranks).scatter_(1, order, rank).masked_fill_(self.chosen, TAKEN)
        gained = line_masses(
            self.mass, self.columns, weights=self.weights, ranks=self.ranks, own_rank=True, wanted=self.missing
        )
        gained = gained.masked_fill_(self.chosen, 0.0).gather(1, order)
        gained.masked_fill_(gained < self.least_rate * costs.gather(1, order), 0.0)
        taken = (gained > 0) & (_before(gained) < self.missing[:, None])
        self._settle(order, taken, gained)

    def _ranked(self, lines: Tensor, tried: Tensor) -> Tensor:
        """Set the ranks of the tried lines ``[H, K]`` to their positions, and return the gain of each without earlier
        ones.
        """
        place = torch.arange(lines.shape[1], dtype=torch.int32, device=lines.device).expand_as(lines)
        # A line taken earlier may follow the possible ones in the list.
        self.ranks.scatter_(1, lines, torch.where(tried, place, self._resting(lines)))
        listed = lines.masked_fill(~tried, -1).int()
        return line_masses(self.mass, self.columns, weights=self.weights, ranks=self.ranks, own_rank=True, lines=listed)

    def _resting(self, lines: Tensor) -> Tensor:
        """Return the ranks of lines ``[H, K]`` between rounds."""
        free = torch.full(lines.shape, FREE, dtype=torch.int32, device=lines.device)
        return free.masked_fill_(self.chosen.gather(1, lines), TAKEN)

    def _settle(self, lines: Tensor, taken: Tensor, gained: Tensor) -> None:
        """Mark taken lines ``[H, K]`` as chosen, and free all others."""
        self.chosen.scatter_(1, lines, self.chosen.gather(1, lines) | taken)
        self.ranks.scatter_(1, lines, self._resting(lines))
        self.missing = self.missing - (gained * taken).sum(1)


def _before(gained: Tensor) -> Tensor:
    """Return the sums before each position ``[H, K]``."""
    gained = gained.double()
    return gained.cumsum(1) - gained


def choose_lines(
    queries: Tensor,
    keys: Tensor,
    columns: Tensor,
    new_tokens: int,
    *,
    scaling: float,
    softcap: float | None,
    first_valid: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return chosen lines bool ``[Hq, 2, n]``, covered and total mass per row ``[Hq, r]``, cost ``[Hq]``.

    See the operation.
    """
    rows = line_scores(queries, keys, columns, scaling=scaling, softcap=softcap, first_valid=first_valid)[0]
    return select_lines(rows, columns, new_tokens, **options)
