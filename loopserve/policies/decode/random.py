"""Implement random selection: the baseline that every method must exceed."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from loopserve.core.kv.selection import Retention
from loopserve.core.policy.base import Capabilities
from loopserve.core.policy.interfaces import AttentionInputs
from loopserve.core.policy.scoring import ScoredCompressor, ScoredConfig
from loopserve.policies.draws import generator


class RandomDecode(ScoredCompressor):
    """Keep sinks, the recent window and otherwise pairs drawn at random: what any selection must exceed at the same budget.

    No paper. The draw depends on seed, turn, layer and length alone, so it can be repeated.

    Multi-turn: drawn again at the end of each turn's prefill, over history and new turn alike; with retention ``evict`` only the
    pairs drawn before can be drawn again.
    """

    name: ClassVar[str] = "random"
    paper: ClassVar[str] = ""
    capabilities: ClassVar[Capabilities] = Capabilities(retentions=frozenset(Retention))

    class Config(ScoredConfig):
        seed: int = Field(0, ge=0, description="Seed of the draw.")

    config: Config

    def score(self, inputs: AttentionInputs) -> Tensor:
        source = generator(self.config.seed, inputs.turn, inputs.layer.index, inputs.total_tokens)
        return torch.rand(inputs.keys.shape[:2], generator=source, dtype=torch.float32, device="cpu").to(
            inputs.keys.device
        )
