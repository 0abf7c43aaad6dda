"""Implement the decode half of DuoAttention: retrieval heads keep every pair, streaming heads sinks and recent pairs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from loopserve.core.kv.selection import KVSelection, Retention
from loopserve.core.policy.base import Capabilities, PolicyConfig
from loopserve.core.policy.interfaces import AttentionInputs, DecodeCompressor, Phase, Selections, Step
from loopserve.core.policy.layers import LayerSpec
from loopserve.policies.head_split import HeadSplit, SplitConfig, measurable, measured_split


@dataclass
class DuoState:
    """Hold the retrieval heads of each layer, bool ``[Hkv]``, once they are known."""

    retrieval: dict[int, Tensor] = field(default_factory=dict)


class DuoDecode(DecodeCompressor[DuoState]):
    """Attend to every pair in retrieval heads, and to sinks and a recent window in streaming heads (DuoAttention).

    Paper: https://arxiv.org/abs/2410.10819. Variant: 64 sinks and 256 recent tokens, half of the KV heads retrieval heads, as the
    paper runs models with grouped queries. There is no budget: pairs attended grow with the conversation, as far as retrieval heads
    go.

    Deviations: the split is that of the prefill policy ``duo``, read from a file or measured instead of trained (see there). The
    window moves every ``interval`` outputs, and the outputs in between come on top of it; 1 moves it with each output, as in the
    paper. Keys keep the rotation of their position in the conversation.

    Multi-turn: the split stays as it was found. With retention ``evict``, as in the paper, streaming heads lose for good what is
    outside of sinks and window, and retrieval heads lose nothing. With ``keep`` a new turn's prefill sees the whole history in every
    head, unless its own policy leaves it out.
    """

    name: ClassVar[str] = "duo"
    paper: ClassVar[str] = "https://arxiv.org/abs/2410.10819"
    capabilities: ClassVar[Capabilities] = Capabilities(retentions=frozenset(Retention))

    class Config(SplitConfig):
        interval: int = Field(16, gt=0, description="Outputs between two moves of the window of streaming heads.")
        retention: Retention = Field(
            Retention.KEEP,
            description="keep: a later turn sees the whole history; evict: streaming heads lose what slid out.",
        )

    config: Config

    def __init__(self, config: PolicyConfig | None = None) -> None:
        super().__init__(config)
        self.split = HeadSplit(self.config)

    def refuses(self, layer: LayerSpec) -> str | None:
        return self.split.refuses(layer)

    def init_state(self) -> DuoState:
        return DuoState()

    def after_attention(self, inputs: AttentionInputs, state: DuoState) -> None:
        layer = inputs.layer.index
        if layer in state.retrieval or inputs.phase is not Phase.PREFILL:
            return
        if self.config.heads is not None:
            given = self.split.of(layer, inputs.keys.device)
            assert given is not None, "refused when the model was loaded"
            state.retrieval[layer] = given
        elif measurable(inputs, self.config):
            state.retrieval[layer] = measured_split(inputs, self.config, kind="scoring")

    def after_forward(self, step: Step, state: DuoState) -> Selections | None:
        config, length = self.config, step.length
        if step.phase is Phase.OBSERVE or not step.final or config.sink_tokens + config.recent_window >= length:
            return None
        if step.phase is Phase.DECODE and step.output_index % config.interval:
            return None
        return {
            layer: self._selection(retrieval, length)
            for layer, retrieval in state.retrieval.items()
            if not bool(retrieval.all())
        }

    def _selection(self, retrieval: Tensor, length: int) -> KVSelection:
        config, device = self.config, retrieval.device
        every = torch.arange(length, device=device)
        kept = torch.cat([every[: config.sink_tokens], every[length - config.recent_window :]])
        if not bool(retrieval.any()):
            return KVSelection.uniform(kept.expand(len(retrieval), -1), length, config.retention)
        short = torch.cat([every.new_full((length - len(kept),), -1), kept])
        indices = torch.where(retrieval[:, None], every, short)
        lengths = torch.where(retrieval, length, len(kept))
        return KVSelection(indices, lengths, length, config.retention)
