"""Measure the divergence of a stack's next-token distributions from those of dense attention on the same answer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loopserve.core.errors import ModelError

_WHOLE = 4096  # vocabularies up to this size are stored whole
_KEPT = 256  # of larger ones the likeliest tokens are stored, and all others merged into one
_LEAST = 1e-30


@dataclass(frozen=True)
class Distributions:
    """Hold dense attention's distributions over the tokens of one answer, on the CPU.

    logs ``[n, k]``: log-probabilities, float64. ids ``[n, k]``: token ids; None for the whole vocabulary in order.
    """

    logs: Tensor
    ids: Tensor | None

    @classmethod
    def of(cls, logits: Sequence[Tensor]) -> Distributions:
        """Return the distributions for the logits ``[vocabulary]`` of each token of an answer."""
        if not logits:
            return cls(torch.empty(0, 0, dtype=torch.float64, device="cpu"), None)
        if len(logits[0]) <= _WHOLE:
            return cls(torch.stack([_logs(each).cpu() for each in logits]), None)
        best = [_logs(each).topk(_KEPT) for each in logits]
        return cls(
            torch.stack([each.values.cpu() for each in best]), torch.stack([each.indices.cpu() for each in best])
        )

    def divergences(self, logits: Sequence[Tensor]) -> list[float]:
        """Return KL(dense || other) in nats for each token of the answer.

        Of a large vocabulary all tokens but dense's 256 likeliest are merged into one, which can only reduce the
        divergence.
        """
        return [
            _divergence(dense, _logs(other).cpu(), None if self.ids is None else self.ids[number])
            for number, (dense, other) in enumerate(zip(self.logs, logits, strict=True))
        ]


def _logs(logits: Tensor) -> Tensor:
    return logits.double().log_softmax(-1)


def _divergence(dense: Tensor, other: Tensor, ids: Tensor | None) -> float:
    if ids is not None:
        other = other[ids]
        dense, other = _with_rest(dense), _with_rest(other)
    if other.isnan().any() or dense.isnan().any():
        raise ModelError("the model's logits are not numbers (NaN)")
    likely = dense.exp()
    # Tokens without mass under dense add nothing. A token excluded only by the other side counts with the smallest probability.
    terms = likely * (dense - other.clamp(min=math.log(_LEAST)))
    return max(0.0, float(terms[likely > 0].sum()))


def _with_rest(logs: Tensor) -> Tensor:
    """Append the log-probability of all remaining tokens."""
    rest = (1.0 - logs.exp().sum()).clamp(min=_LEAST).log()
    return torch.cat([logs, rest[None]])
