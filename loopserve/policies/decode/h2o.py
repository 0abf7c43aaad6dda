"""Implement H2O: keep the pairs that all queries so far have attended to most, and the last ones."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import pad

from loopserve.core.kv.selection import Retention
from loopserve.core.policy.base import Capabilities
from loopserve.core.policy.interfaces import AttentionInputs, Phase
from loopserve.core.policy.scoring import ScoredState
from loopserve.policies.attended import attention_over, received
from loopserve.policies.decode.rolling import RollingCompressor, RollingConfig


class H2ODecode(RollingCompressor):
    """Keep the recent window and the heavy hitters: pairs with most attention from all queries so far (H2O).

    Paper: https://arxiv.org/abs/2306.14048. Variant: attention is summed over every query of the prompt and every output, half of
    the budget goes to the last tokens and half to the heavy hitters. With each output the pair with the least attention is dropped,
    as published. ``normalise`` divides by the number of queries that could see a pair, as in kvpress's observed attention (which
    has no recent window). ``score`` is that formula for one call.

    Deviations: one selection per KV head, by the mean over the group, where the authors select per query head. Exact softmax sums
    are computed over all keys in a separate pass, since fused attention returns none. This costs as much as dense scores, under a
    sparse prefill as well. The attention of an output is summed over the pairs still attended.

    Multi-turn: sums continue over turns, so pairs that early turns attended to keep their score. With ``keep`` a new turn's queries
    see the whole history, and a dropped pair can be selected again. With ``evict`` dropped pairs are removed, as published.
    """

    name: ClassVar[str] = "h2o"
    paper: ClassVar[str] = "https://arxiv.org/abs/2306.14048"
    capabilities: ClassVar[Capabilities] = Capabilities(retentions=frozenset(Retention))

    class Config(RollingConfig):
        sink_tokens: int = Field(0, ge=0, description="First tokens of the conversation that are always kept.")
        recent_window: int = Field(0, ge=0, description="Last tokens kept even where their share is smaller.")
        heavy_share: float = Field(
            0.5, gt=0, le=1, description="Share of the budget for heavy hitters; the rest goes to the last tokens."
        )
        normalise: bool = Field(False, description="Divide a pair's sum by the number of queries that could see it.")

    config: Config

    @property
    def limits(self) -> RollingConfig:
        """Return the configuration with the recent window that the share gives."""
        config = self.config
        recent = config.budget - math.ceil(config.budget * config.heavy_share)
        forced = min(max(recent, config.recent_window), config.budget - config.sink_tokens)
        return config.model_copy(update={"recent_window": forced})

    def score(self, inputs: AttentionInputs) -> Tensor:
        length = inputs.length
        seen_by = (length - inputs.positions.expand(inputs.keys.shape[0], -1)).clamp(min=1, max=inputs.new_tokens)
        return received(inputs) / seen_by

    def observe(self, inputs: AttentionInputs, state: ScoredState) -> None:
        if inputs.phase is Phase.OBSERVE:
            return
        decoding = inputs.phase is Phase.DECODE
        fresh = attention_over(inputs, inputs.attended(inputs.selection)) if decoding else received(inputs)
        heads, length = len(fresh), inputs.length
        held = state.statistics.get(inputs.layer.index, fresh.new_zeros(heads, 0))
        sums = pad(held, (0, length - held.shape[1]))
        positions = inputs.positions.expand(heads, -1).clamp(min=0)
        state.statistics[inputs.layer.index] = sums.scatter_add(1, positions, fresh * inputs.holds)

    def ranking(self, inputs: AttentionInputs, state: ScoredState, budget: int) -> Tensor:
        sums: Tensor = state.statistics[inputs.layer.index]
        if self.config.normalise:
            sums = sums / torch.arange(sums.shape[1], 0, -1, device=sums.device)
        return sums.gather(1, inputs.positions.expand(len(sums), -1).clamp(min=0))
