"""Steer the weight from which on a pair is attended, so that the pairs attended are the budget in the mean."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

# Gains of the controller, in log-weight per step's worth of budget: of the last step's excess, and of the sum of all so far. The sum
# brings the mean itself to the budget, where the excess alone would keep what the first steps spent too much. With the number of
# pairs about proportional to 1 / weight both together settle in some 20 steps, without swinging past.
_GAIN_LAST, _GAIN_SUM = 0.15, 0.01
_GAIN_FIRST = 0.6  # of the first step, a half of it of the second, and so on: the prompt's last query may differ from all outputs'
_LARGEST = 4.0  # excess of one step that counts, so that one flat step does not starve the next ones
_SAVED, _OWED = -4.0, 16.0  # limits of the sum: of what was left over little is spent later, what was overspent is owed
_LOWEST = -16.0  # 1e-7: lighter pairs are not worth a budget that is left, and the way back from there is short


@dataclass
class ThresholdController:
    """Hold one log-weight for all heads and layers of a session, and what was attended since it began.

    One threshold for all heads spends each pair where it holds most attention: any other choice of as many pairs leaves out more,
    summed over the heads. log_threshold: natural log of a share of one head's attention; None before the first selection.
    excess: sum over the steps of (pairs attended / budget - 1). steps: how many. pairs, heads: of the current step, so far.
    """

    log_threshold: float | None = None
    excess: float = 0.0
    steps: int = 0
    pairs: int = 0
    heads: int = 0

    def begin(self, weights: Iterable[Tensor], budget: int) -> None:
        """Start from the threshold that gives ``budget`` pairs per head, mean over the heads of these log-weights ``[Hkv, n]``."""
        rows = list(weights)
        heads = sum(len(each) for each in rows)
        found = torch.cat([each.flatten() for each in rows])
        wanted = min(max(1, heads * budget), len(found))
        self.log_threshold = max(float(found.topk(wanted).values[-1]), _LOWEST) if len(found) else _LOWEST

    def add(self, pairs: int, heads: int) -> None:
        """Count what one layer attends to in the current step, summed over its heads."""
        self.pairs += pairs
        self.heads += heads

    def end_step(self, budget: int) -> None:
        """Move the threshold by what the step attended to."""
        if self.heads and self.log_threshold is not None:
            excess = min(self.pairs / self.heads / budget - 1, _LARGEST)
            self.steps += 1
            self.excess = min(max(self.excess + excess, _SAVED), _OWED)
            gain = max(_GAIN_LAST, _GAIN_FIRST / self.steps)
            moved = self.log_threshold + gain * excess + _GAIN_SUM * self.excess
            self.log_threshold = min(max(moved, _LOWEST), 0.0)
        self.pairs = self.heads = 0
