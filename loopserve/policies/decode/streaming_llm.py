"""Implement StreamingLLM: attention sinks and a rolling window."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from pydantic import Field, model_validator

from loopserve.core.kv.selection import KVSelection, Retention
from loopserve.core.policy.base import Capabilities, PolicyConfig
from loopserve.core.policy.interfaces import AttentionInputs, DecodeCompressor, Phase, Selections, Step


@dataclass
class StreamingState:
    """Hold the number of KV heads and the device of each layer, as seen in its attention calls."""

    layers: dict[int, tuple[int, torch.device]] = field(default_factory=dict)


class StreamingLLMDecode(DecodeCompressor[StreamingState]):
    """Attend to the first tokens of the conversation and to a rolling window of its last tokens (StreamingLLM).

    Paper: https://arxiv.org/abs/2309.17453. Variant: each step attends to exactly ``min(budget, length)`` pairs, the current token
    and this turn's outputs included, so the window slides by one with each output.

    Deviation: keys keep the rotation of their position in the conversation. The paper re-indexes positions inside the window, which
    makes a difference only beyond the length that a model was trained for.

    Multi-turn: with retention ``keep`` a new turn's prefill sees the whole history, and the window is placed at its end. With
    ``evict``, as in the paper, it sees sinks and window only, and all other pairs are lost.
    """

    name: ClassVar[str] = "streaming_llm"
    paper: ClassVar[str] = "https://arxiv.org/abs/2309.17453"
    capabilities: ClassVar[Capabilities] = Capabilities(retentions=frozenset(Retention))

    class Config(PolicyConfig):
        budget: int = Field(
            1024, gt=0, description="KV pairs attended per KV head, sinks and this turn's outputs included."
        )
        sink_tokens: int = Field(4, ge=0, description="First tokens of the conversation that are always attended.")
        retention: Retention = Field(
            Retention.KEEP, description="keep: a later turn sees the whole history; evict: what slid out is gone."
        )

        @model_validator(mode="after")
        def _window_is_left(self) -> StreamingLLMDecode.Config:
            if self.sink_tokens >= self.budget:
                raise ValueError(
                    f"sink_tokens ({self.sink_tokens}) must leave a part of the budget to the window; the budget is ({self.budget})"
                )
            return self

    config: Config

    @property
    def counts_outputs(self) -> bool:
        return True

    def init_state(self) -> StreamingState:
        return StreamingState()

    def after_attention(self, inputs: AttentionInputs, state: StreamingState) -> None:
        state.layers[inputs.layer.index] = (inputs.keys.shape[0], inputs.keys.device)

    def after_forward(self, step: Step, state: StreamingState) -> Selections | None:
        if step.phase is Phase.OBSERVE or not step.final:
            return None
        sinks, retention = self.config.sink_tokens, self.config.retention
        start = step.length + 1 - (self.config.budget - sinks)  # the next step adds one pair
        if start <= sinks:
            return None
        kept = torch.cat([torch.arange(sinks, device="cpu"), torch.arange(start, step.length, device="cpu")])
        return {
            index: KVSelection.uniform(kept.to(device).expand(heads, -1), step.length, retention)
            for index, (heads, device) in state.layers.items()
        }
