"""The general work of a compressor that ranks tokens by a score: budget, sinks, recent window, ties and order, done once.

Knows no score: a method implements ``score()`` and is done.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field

from pydantic import Field, model_validator
from torch import Tensor

from loopserve.core.interfaces import (
    AttentionInputs,
    DecodeCompressor,
    KVSelection,
    Phase,
    PolicyConfig,
    Retention,
    Selections,
    Step,
)
from loopserve.kernels.top_columns import top_columns


def to_positions(columns: Tensor, inputs: AttentionInputs) -> Tensor:
    """Original positions of the chosen columns ``[Hkv, S]``."""
    if inputs.positions.dim() == 1:
        return inputs.positions[columns]
    return inputs.positions.gather(1, columns)


class ScoredConfig(PolicyConfig):
    """Options every scored compressor has."""

    budget: int = Field(
        1024, gt=0, description="KV pairs kept per KV head, in tokens; this turn's outputs come on top."
    )
    sink_tokens: int = Field(4, ge=0, description="First tokens of the conversation that are always kept.")
    recent_window: int = Field(32, ge=0, description="Last tokens of the input that are always kept.")
    retention: Retention = Field(
        Retention.KEEP, description="keep: the rest can be selected again; evict: it is gone and its bytes are freed."
    )

    @model_validator(mode="after")
    def _forced_fit(self) -> ScoredConfig:
        if self.sink_tokens + self.recent_window > self.budget:
            raise ValueError(
                f"sink_tokens + recent_window ({self.sink_tokens} + {self.recent_window}) exceed the budget ({self.budget})"
            )
        return self


@dataclass
class ScoredState:
    """Selections made while a forward pass runs, handed over at its end."""

    pending: dict[int, KVSelection] = field(default_factory=dict)


class ScoredCompressor(DecodeCompressor[ScoredState]):
    """Ranks all stored pairs once at the end of each turn's prefill and keeps the best for the answer.

    A new turn's prefill sees the whole store (retention ``keep``) or the survivors (``evict``); the selection is then made again
    from scratch over history and new turn alike.
    """

    class Config(ScoredConfig):
        """Options every scored compressor has."""

    config: ScoredConfig

    @abstractmethod
    def score(self, inputs: AttentionInputs) -> Tensor:
        """Importance of each stored pair, ``[Hkv, Tk]``; larger is kept first."""

    def init_state(self) -> ScoredState:
        return ScoredState()

    def after_attention(self, inputs: AttentionInputs, state: ScoredState) -> None:
        if inputs.phase is not Phase.PREFILL or not inputs.final:
            return
        if inputs.total_tokens <= self.config.budget:  # nothing to leave out
            return
        columns = top_columns(
            self.score(inputs),
            self.config.budget,
            sink_tokens=self.config.sink_tokens,
            recent_window=self.config.recent_window,
            first_valid=inputs.first_valid,
        )
        boundary = int(inputs.head_positions(0)[-1]) + 1
        state.pending[inputs.layer.index] = KVSelection.uniform(
            to_positions(columns, inputs), boundary, self.config.retention
        )

    def after_forward(self, step: Step, state: ScoredState) -> Selections | None:
        chosen, state.pending = state.pending, {}
        return chosen or None
