"""Implement SampleAttention: compute the columns that a sample of rows attends to, and a local window."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from pydantic import Field

from loopserve.core.policy.base import PolicyConfig
from loopserve.core.policy.interfaces import AttentionInputs, PrefillSparsifier
from loopserve.core.policy.patterns import AttentionPattern, LinePattern
from loopserve.policies.blocks import largest_share
from loopserve.policies.lines import sink_lines


class SampleAttentionPrefill(PrefillSparsifier):
    """Compute a local window and, per head, the fewest columns that hold a share ``alpha`` of a sample of rows' attention
    (SampleAttention).

    Paper: https://arxiv.org/abs/2406.15486. Variant: rows at even steps, 5 % of them, the last one among them; the window is 8 % of
    the conversation; columns are taken by their summed mass until they hold ``alpha`` of it.

    Deviations: columns are taken exactly, without a grid of candidate ratios. There are no slash lines except the window, as in the
    paper. The share is of the sample's whole mass, window included, so window and columns together hold more than alpha.

    Multi-turn: columns are chosen again for each turn over history and turn. The window reaches from each new token into the
    history and grows with it. Nothing is evicted. After an eviction by a decode policy, columns are those of survivors.
    """

    name: ClassVar[str] = "sample_attention"
    paper: ClassVar[str] = "https://arxiv.org/abs/2406.15486"

    class Config(PolicyConfig):
        alpha: float = Field(0.95, gt=0, le=1, description="Share of the sampled attention that the columns hold.")
        sample_share: float = Field(0.05, gt=0, le=1, description="Share of the turn's rows that are sampled.")
        local_share: float = Field(0.08, gt=0, le=1, description="The local window as a share of the conversation.")
        sink_tokens: int = Field(4, ge=0, description="First stored tokens that every new token attends to.")

    config: Config

    def sparsify(self, inputs: AttentionInputs) -> AttentionPattern:
        config, heads, total = self.config, inputs.queries.shape[0], inputs.total_tokens
        count = max(1, math.ceil(inputs.new_tokens * config.sample_share))
        steps = torch.arange(1, count + 1, device=inputs.keys.device)
        rows = steps * inputs.new_tokens // count - 1
        mass = inputs.row_attention(rows, kind="lines").vertical
        columns = largest_share(mass, config.alpha) | sink_lines(inputs, config.sink_tokens)
        window = max(1, math.ceil(total * config.local_share))
        return LinePattern.window(heads, inputs.new_tokens, total, columns, window)
