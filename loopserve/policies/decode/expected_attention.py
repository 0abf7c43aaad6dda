"""Implement Expected Attention: rank pairs by the expected attention of later queries, from the distribution of the queries so far."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from loopserve.core.kv.selection import Retention
from loopserve.core.policy.base import Capabilities
from loopserve.core.policy.interfaces import AttentionInputs, Phase
from loopserve.core.policy.layers import LayerParts, Need
from loopserve.core.policy.scoring import ScoredCompressor, ScoredConfig, ScoredState

_POSITIONS = 128  # future positions whose rotation matrices are in memory at once


@dataclass
class QueryStatistics:
    """Hold mean ``[Hq, D]`` and summed outer products of deviations ``[Hq, D, D]`` of queries before their rotation."""

    count: int
    mean: Tensor
    spread: Tensor

    @classmethod
    def of(cls, queries: Tensor) -> QueryStatistics:
        """Return the statistics of queries ``[Hq, T, D]``."""
        mean = queries.mean(1)
        centred = queries - mean[:, None]
        return cls(queries.shape[1], mean, centred.transpose(1, 2) @ centred)

    def joined(self, other: QueryStatistics) -> QueryStatistics:
        """Return the statistics of both samples together."""
        count = self.count + other.count
        shift = other.mean - self.mean
        between = shift[:, :, None] * shift[:, None] * (self.count * other.count / count)
        return QueryStatistics(count, self.mean + shift * (other.count / count), self.spread + other.spread + between)


class ExpectedAttentionDecode(ScoredCompressor):
    """Keep the pairs that the next queries are expected to attend to, weighed by the length of their values (Expected Attention).

    Paper: https://arxiv.org/abs/2510.00636. Variant, as in kvpress: queries before rotation are taken as Gaussian with the turn's
    mean and covariance. Both are rotated by the mean rotation of the next ``future`` positions. The expected exponent of ``q K /
    sqrt(d)`` gives ``softmax(mean K / sqrt(d) + K cov K / 2d)`` over the pairs after the sinks. The score is its mean over the
    group, plus ``epsilon``, times ``|V|``. Sinks have no score and are kept.

    Deviations: queries arrive rotated and the rotation is undone, which is exact. They are those of the current turn, without the
    first ``sink_tokens`` positions of the conversation. Softcaps are not part of the Gaussian formula. With a single query the
    covariance is zero.

    Multi-turn: the distribution is that of the new turn's queries (all chunks of its prefill), and history and turn are ranked
    together. Outputs are attended in addition. With ``evict`` the survivors are ranked. The queries of a very short turn predict
    later queries poorly.
    """

    name: ClassVar[str] = "expected_attention"
    paper: ClassVar[str] = "https://arxiv.org/abs/2510.00636"
    capabilities: ClassVar[Capabilities] = Capabilities(retentions=frozenset(Retention), needs=frozenset({Need.ROTARY}))
    state_types: ClassVar[tuple[type, ...]] = (QueryStatistics,)

    class Config(ScoredConfig):
        future: int = Field(512, gt=0, description="Next positions whose queries are expected.")
        covariance: bool = Field(True, description="Use the covariance of the queries, not only their mean.")
        value_norm: bool = Field(True, description="Weigh the expected attention by the length of the value.")
        epsilon: float = Field(0.0, ge=0, description="Added before weighing, so that long values count a little more.")

    config: Config

    def end_turn(self, state: ScoredState) -> None:
        for layer, statistics in list(state.statistics.items()):
            if isinstance(statistics, QueryStatistics):  # not kept: the next turn has its own queries
                del state.statistics[layer]

    def observe(self, inputs: AttentionInputs, state: ScoredState) -> None:
        if inputs.phase is not Phase.PREFILL:
            return
        statistics = self._statistics(inputs)
        held = state.statistics.get(inputs.layer.index)
        if statistics is not None:
            state.statistics[inputs.layer.index] = statistics if held is None else held.joined(statistics)

    def ranking(self, inputs: AttentionInputs, state: ScoredState, budget: int) -> Tensor:
        return self._score(inputs, state.statistics.get(inputs.layer.index))

    def score(self, inputs: AttentionInputs) -> Tensor:
        return self._score(inputs, self._statistics(inputs))

    def _statistics(self, inputs: AttentionInputs) -> QueryStatistics | None:
        positions = inputs.head_positions(0)[inputs.columns]
        rows = positions >= self.config.sink_tokens
        if not bool(rows.any()):
            return None
        queries = inputs.queries[:, rows].float()
        return QueryStatistics.of(_parts(inputs).rotate(queries, positions[rows], back=True))

    def _score(self, inputs: AttentionInputs, statistics: QueryStatistics | None) -> Tensor:
        heads, total, _ = inputs.keys.shape
        columns = torch.arange(total, device=inputs.keys.device)
        start = torch.zeros(heads, dtype=torch.long, device=columns.device)
        start = (start if inputs.first_valid is None else inputs.first_valid) + self.config.sink_tokens
        ranked = columns >= start[:, None]
        if statistics is None or not bool(ranked.any()):
            return torch.zeros(heads, total, dtype=torch.float32, device=columns.device).masked_fill(
                ~ranked, float("inf")
            )
        turned = self._mean_rotation(inputs)
        mean = statistics.mean @ turned.T
        keys = inputs.keys.float().repeat_interleave(inputs.group, dim=0)
        logits = (keys @ mean[:, :, None])[..., 0] * inputs.scaling
        if self.config.covariance:
            covariance = turned @ (statistics.spread / statistics.count) @ turned.T
            logits = logits + ((keys @ covariance) * keys).sum(-1) * (inputs.scaling**2 / 2)
        hidden = ~ranked.repeat_interleave(inputs.group, dim=0)
        spread = logits.masked_fill(hidden, float("-inf")).softmax(-1).view(heads, inputs.group, total).mean(1)
        if self.config.value_norm:
            spread = (spread + self.config.epsilon) * inputs.values.float().norm(dim=-1)
        return spread.masked_fill(~ranked, float("inf"))

    def _mean_rotation(self, inputs: AttentionInputs) -> Tensor:
        """Return the mean rotation ``[D, D]`` of the next positions, acting on column vectors."""
        device, dim = inputs.keys.device, inputs.keys.shape[2]
        basis = torch.eye(dim, dtype=torch.float32, device=device)[:, None]
        total = torch.zeros(dim, dim, dtype=torch.float32, device=device)
        for ahead in (torch.arange(self.config.future, device=device) + inputs.length).split(_POSITIONS):
            total += _parts(inputs).rotate(basis.expand(-1, len(ahead), -1), ahead).sum(1)
        return (total / self.config.future).T


def _parts(inputs: AttentionInputs) -> LayerParts:
    assert inputs.layer.parts is not None, "a stack without rotary parts is refused when the model is loaded"
    return inputs.layer.parts
