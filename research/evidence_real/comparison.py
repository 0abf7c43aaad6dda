"""Compare the next-token distributions of a stack with those of dense attention, over teacher-forced tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

BLOCK = 16  # tokens whose mean is one observation of the standard errors

Found = dict[str, Any]


class Reference:
    """Hold dense attention's distributions after each forced token: log-probabilities ``[n, vocabulary]``."""

    def __init__(self, logits: Tensor, targets: Sequence[int]) -> None:
        """targets: the token that follows each."""
        self.logs = logits.float().log_softmax(-1)
        self.best = self.logs.argmax(-1)
        self.targets = targets

    def compare(self, index: int, logits: Tensor) -> tuple[float, bool, float]:
        """Return KL(dense || other) in nats, whether the likeliest token is the same, and the loss of probability of the token
        that follows, in nats.
        """
        ours, other = self.logs[index], logits.float().log_softmax(-1)
        terms = ours.exp() * (ours - other.clamp(min=-69.0))
        target = self.targets[index]
        kl = max(0.0, float(terms.double().sum()))
        return kl, bool(other.argmax() == self.best[index]), float(ours[target] - other[target])


@dataclass
class Forced:
    """Replace a sampler: give the forced tokens one by one, and compare the logits that each but the first was chosen from."""

    tokens: Sequence[int]
    reference: Reference
    kl: list[float] = field(default_factory=list)
    same: list[bool] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    given: int = 0

    def __call__(self, logits: Tensor) -> int:
        if self.given:
            self.add(self.given - 1, logits)
        self.given += 1
        return self.tokens[self.given - 1]

    def add(self, index: int, logits: Tensor) -> None:
        kl, same, loss = self.reference.compare(index, logits)
        self.kl.append(kl)
        self.same.append(same)
        self.loss.append(loss)

    def found(self) -> Found:
        """Return the sums over blocks of ``BLOCK`` tokens; a last, shorter block counts too."""
        return {
            "tokens": len(self.kl),
            "kl": [round(each, 5) for each in _sums(self.kl)],
            "same": [int(each) for each in _sums(self.same)],
            "loss": [round(each, 4) for each in _sums(self.loss)],
        }


def _sums(values: Sequence[float]) -> list[float]:
    return [sum(values[start : start + BLOCK]) for start in range(0, len(values), BLOCK)]
