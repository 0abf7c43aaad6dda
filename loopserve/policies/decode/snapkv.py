"""Implement SnapKV: keep what the last tokens of the prompt attend to."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import Tensor
from torch.nn.functional import avg_pool1d, pad

from loopserve.core.kv.selection import Retention
from loopserve.core.policy.base import Capabilities
from loopserve.core.policy.interfaces import AttentionInputs
from loopserve.core.policy.scoring import ScoredCompressor
from loopserve.policies.decode.observation_window import ObservationWindowConfig


class SnapKVDecode(ScoredCompressor):
    """Keep the observation window and the pairs that its queries attend to most (SnapKV).

    Paper: https://arxiv.org/abs/2404.14469. Variant, as in kvpress: ``s`` = mean over the window's queries of their softmax over
    all keys; average pooling over neighbouring keys before the window (zeros beyond the edges count); mean over the group.

    Deviations: one selection per KV head, not per query head as in the authors' code, and a mean where it sums (the order is the
    same); the budget includes the window and is exact. If the last chunk of a turn's prefill is shorter than the window, the window
    shrinks to it.

    Multi-turn: recomputed at the end of each turn's prefill over the history and the new turn, where the authors' code and SCBench
    compress the first prefill only. With retention ``keep`` a new turn sees the whole history; with ``evict`` it sees the
    survivors, and evicted pairs are lost. After an eviction, neighbours are neighbouring survivors.
    """

    name: ClassVar[str] = "snapkv"
    paper: ClassVar[str] = "https://arxiv.org/abs/2404.14469"
    capabilities: ClassVar[Capabilities] = Capabilities(retentions=frozenset(Retention))

    class Config(ObservationWindowConfig):
        window: int = Field(
            32, gt=0, description="Last queries of the prompt that observe; their own pairs are always kept."
        )
        kernel: int = Field(5, gt=0, description="Width of the average pooling over neighbouring keys; odd, 1 = none.")

    config: Config

    def score(self, inputs: AttentionInputs) -> Tensor:
        window = min(self.config.window, inputs.new_tokens)
        scores = inputs.token_scores(inputs.queries[:, -window:], inputs.columns[-window:])
        seen = scores[:, : inputs.total_tokens - window]
        if self.config.kernel > 1 and seen.shape[1]:
            kernel = self.config.kernel
            seen = avg_pool1d(seen[:, None], kernel, stride=1, padding=kernel // 2, count_include_pad=True)[:, 0]
        return pad(seen, (0, window), value=float("inf"))
