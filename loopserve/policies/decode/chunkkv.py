"""Implement ChunkKV: select whole runs of tokens instead of single ones."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from loopserve.core.kv.selection import Retention
from loopserve.core.policy.base import Capabilities
from loopserve.core.policy.interfaces import AttentionInputs
from loopserve.core.policy.scoring import ScoredState
from loopserve.core.policy.wrappers import ScoredWrapper, WrapperConfig


class ChunkKVDecode(ScoredWrapper):
    """Keep or drop neighbouring tokens together, by the mean score of their chunk (ChunkKV).

    Paper: https://arxiv.org/abs/2502.00299. Variant, as in kvpress: scores are summed over the KV heads, then averaged over chunks
    of ``chunk`` columns; the last chunk may be shorter. All heads of a layer keep the same chunks.

    Deviations: the budget is exact, so the last chunk taken may be taken in part, its first tokens first; kvpress rounds the number
    of chunks down (140 pairs kept of 300 at a half). The paper's reuse of one layer's selection in the next layer is not
    implemented. Where heads hold different pairs (inside AdaKV, with eviction) each head chunks its own columns.

    Multi-turn: chunks are counted from the first stored pair, over history and new turn. After an eviction they consist of
    neighbouring survivors, which are mostly whole earlier chunks.
    """

    name: ClassVar[str] = "chunkkv"
    paper: ClassVar[str] = "https://arxiv.org/abs/2502.00299"
    capabilities: ClassVar[Capabilities] = Capabilities(retentions=frozenset(Retention))

    class Config(WrapperConfig):
        chunk: int = Field(20, gt=0, description="Tokens per chunk.")

    config: Config

    def ranking(self, inputs: AttentionInputs, state: ScoredState, budget: int) -> Tensor:
        scores = self.inner.ranking(inputs, state, budget)
        return chunked(scores, inputs.holds, self.config.chunk, shared=_aligned(inputs))


def _aligned(inputs: AttentionInputs) -> bool:
    """Return whether a column holds the same token in every head."""
    return inputs.positions.dim() == 1 or bool((inputs.positions == inputs.positions[:1]).all())


def chunked(scores: Tensor, holds: Tensor, chunk: int, *, shared: bool) -> Tensor:
    """Return the mean score of each column's chunk ``[Hkv, Tk]``, of scores summed over the heads if these share their choice."""
    heads, total = scores.shape
    if shared:
        scores, holds = scores.sum(0, keepdim=True), holds[:1]
    columns = torch.arange(total, device=scores.device)
    of = (columns // chunk).expand_as(scores)
    filled = scores.float().masked_fill(~holds, 0.0)
    sums = filled.new_zeros(len(scores), -(-total // chunk)).scatter_add(1, of, filled)
    counts = torch.zeros_like(sums).scatter_add(1, of, holds.to(sums.dtype))
    return (sums / counts.clamp(min=1)).gather(1, of).expand(heads, total)
