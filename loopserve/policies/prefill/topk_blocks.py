"""Implement block top-p: rank blocks by pooled queries and pooled keys."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from loopserve.core.policy.base import PolicyConfig
from loopserve.core.policy.interfaces import AttentionInputs, PrefillSparsifier
from loopserve.core.policy.patterns import AttentionPattern, BlockPattern
from loopserve.policies.blocks import block_attention, first_and_last, largest_share, pooled, visible_blocks


class TopKBlocksPrefill(PrefillSparsifier):
    """Compute, per block of queries, the key blocks that hold a share of the attention between block means.

    Paper: https://arxiv.org/abs/2502.18137 (SpargeAttn), its first stage. Variant: mean-pooled queries and keys, softmax over the
    key blocks seen, per row the fewest blocks that hold ``top_p``, at least ``least_blocks`` and, if set, at most ``most_blocks``
    (top-k). With ``similarity`` above 0, key blocks whose keys differ too much from their mean (mean cosine below it) are always
    computed, as in the paper.

    Deviations: blocks of 64 for queries and keys alike; no quantisation and no second, per-tile stage. The first block and the
    queries' own blocks are always computed. There may be fewer queries than keys.

    Multi-turn: blocks are chosen again for each turn over history and turn, so a later turn can attend to any block. Nothing is
    evicted. After an eviction by a decode policy, blocks consist of survivors.
    """

    name: ClassVar[str] = "topk_blocks"
    paper: ClassVar[str] = "https://arxiv.org/abs/2502.18137"

    class Config(PolicyConfig):
        top_p: float = Field(
            0.95, gt=0, le=1, description="Share of the pooled attention to cover per block of queries."
        )
        block: int = Field(64, gt=0, description="Rows and keys per block.")
        least_blocks: int = Field(1, ge=1, description="Key blocks computed at least per block of queries.")
        most_blocks: int | None = Field(None, gt=0, description="Key blocks ranked in at most; none by default.")
        similarity: float = Field(
            0.0,
            ge=0,
            le=1,
            description="Mean cosine of a block's keys with their mean below which it is always computed.",
        )

    config: Config

    def sparsify(self, inputs: AttentionInputs) -> AttentionPattern:
        config = self.config
        inputs.record.read("lines", inputs.keys.numel() * inputs.keys.element_size())
        spread = block_attention(inputs, config.block, pooled(inputs.queries, config.block))
        chosen = largest_share(spread, config.top_p, config.least_blocks)
        if config.most_blocks is not None:
            chosen &= largest_share(spread, 0.0, config.most_blocks)
        if config.similarity:
            chosen = chosen | self._unlike(inputs)[:, None]
        blocks = (chosen | first_and_last(inputs, config.block)) & visible_blocks(inputs, config.block)
        return BlockPattern(blocks, inputs.new_tokens, inputs.total_tokens, config.block)

    def _unlike(self, inputs: AttentionInputs) -> Tensor:
        """Return the key blocks whose mean does not represent them: bool ``[Hq, key blocks]``."""
        block, keys = self.config.block, inputs.keys.float()
        means = pooled(inputs.keys, block, inputs.holds)
        own = means.repeat_interleave(block, dim=1)[:, : inputs.total_tokens]
        cosines = torch.nn.functional.cosine_similarity(keys, own, dim=-1)[..., None]
        alike = pooled(cosines, block, inputs.holds)[..., 0]
        return (alike < self.config.similarity).repeat_interleave(inputs.group, dim=0)
