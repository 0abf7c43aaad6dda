"""Implement LagKV: compare a token's key and value with the range of the partition that follows."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from loopserve.core.kv.selection import Retention
from loopserve.core.policy.base import Capabilities
from loopserve.core.policy.interfaces import AttentionInputs
from loopserve.core.policy.scoring import ScoredCompressor, ScoredConfig


class LagKVDecode(ScoredCompressor):
    """Keep, in each partition, the tokens whose keys and values vary most relative to the next partition's range (LagKV).

    Paper: https://arxiv.org/abs/2504.04704. Variant, as in kvpress: after the sinks, tokens are divided into partitions of ``lag``
    tokens. Keys and values are scaled by the minimum and maximum of each channel in the next partition. The standard deviation over
    the channels goes through a softmax within the partition, and the mean of both is ranked there. The score is the rank divided by
    ``lag``. Sinks, the last whole partition and the rest after it score 1. A history shorter than two partitions scores by recency.

    Deviations: ranks are equal across partitions, and ties go to the lowest position, so a budget that ends within a rank favours
    early partitions. ``cross_scoring`` compares the unranked scores. A channel that is constant in the next partition counts as no
    deviation, where kvpress divides by zero.

    Multi-turn: partitions are counted over history and new turn, from the first stored pair. A turn shorter than ``lag`` moves the
    unscored end. After an eviction they are counted over the survivors of each head.
    """

    name: ClassVar[str] = "lagkv"
    paper: ClassVar[str] = "https://arxiv.org/abs/2504.04704"
    capabilities: ClassVar[Capabilities] = Capabilities(retentions=frozenset(Retention))

    class Config(ScoredConfig):
        lag: int = Field(128, gt=1, description="Tokens per partition.")
        cross_scoring: bool = Field(False, description="Compare scores across partitions instead of ranks within them.")

    config: Config

    def score(self, inputs: AttentionInputs) -> Tensor:
        if inputs.first_valid is None:
            return self._score(inputs.keys.float(), inputs.values.float())
        scores = torch.zeros(inputs.keys.shape[:2], dtype=torch.float32, device=inputs.keys.device)
        for head, start in enumerate(inputs.first_valid.tolist()):
            keys, values = inputs.keys[head : head + 1, start:], inputs.values[head : head + 1, start:]
            scores[head, start:] = self._score(keys.float(), values.float())[0]
        return scores

    def _score(self, keys: Tensor, values: Tensor) -> Tensor:
        """Return scores ``[H, T]`` of keys and values ``[H, T, D]`` without filler."""
        heads, total, _ = keys.shape
        sinks, lag = self.config.sink_tokens, self.config.lag
        scores = torch.ones(heads, total, dtype=torch.float32, device=keys.device)
        if total < sinks + 2 * lag:
            scores[:, sinks:] = torch.arange(max(total - sinks, 0), device=keys.device).float() / max(total - sinks, 1)
            return scores
        partitions = (total - sinks) // lag
        inside = slice(sinks, sinks + partitions * lag)
        deviations = (_deviation(keys[:, inside], lag) + _deviation(values[:, inside], lag)) / 2
        if not self.config.cross_scoring:
            deviations = deviations.argsort(dim=-1, stable=True).argsort(dim=-1, stable=True).float() / lag
        scores[:, sinks : sinks + (partitions - 1) * lag] = deviations.flatten(1)
        return scores


def _deviation(vectors: Tensor, lag: int) -> Tensor:
    """Return the softmax within each partition but the last of the deviation over channels: ``[H, P - 1, lag]``."""
    parts = vectors.view(vectors.shape[0], -1, lag, vectors.shape[2])
    low, high = parts[:, 1:].amin(2, keepdim=True), parts[:, 1:].amax(2, keepdim=True)
    span = high - low
    relative = torch.where(span > 0, (parts[:, :-1] - low) / span.clamp(min=torch.finfo(span.dtype).tiny), 0.0)
    return relative.std(-1).softmax(-1)
