"""The general work of a compressor that ranks tokens by a score: budget, sinks, recent window, ties and order, done once.

Knows no score: a method implements ``score()`` and is done.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
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


def select_top(
    scores: Tensor,
    budget: int,
    *,
    sink_tokens: int = 0,
    recent_window: int = 0,
    first_valid: Tensor | None = None,
) -> Tensor:
    """Columns of the ``budget`` best scores per head, sorted: int64 ``[Hkv, min(budget, n)]``.

    scores ``[Hkv, n]``, any float type; NaN counts as lowest. The first ``sink_tokens`` and last ``recent_window`` columns are
    always among them (recent ones win when the budget is smaller than both). Equal scores: the lowest column wins. Heads with
    filler columns (``first_valid``) must all hold at least ``budget`` pairs.
    """
    heads, total = scores.shape
    budget = min(budget, total)
    ranked = scores.float().nan_to_num(nan=float("-inf")).clone()
    columns = torch.arange(total, device=scores.device).expand(heads, total)
    start = (
        torch.zeros(heads, 1, dtype=torch.long, device=scores.device) if first_valid is None else first_valid[:, None]
    )
    # Finite scores are squeezed below the forced ones, so infinite scores cannot push sinks out.
    order = ranked.argsort(dim=-1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(1, order, columns)
    rank = torch.where(columns < start + sink_tokens, rank - 2 * total, rank)
    if recent_window:
        rank = torch.where(columns >= total - recent_window, rank - 4 * total, rank)
    rank = torch.where(columns < start, rank + 8 * total, rank)
    best = rank.argsort(dim=-1, stable=True)[:, :budget]
    return best.sort(dim=-1).values


def to_positions(columns: Tensor, inputs: AttentionInputs) -> Tensor:
    """Original positions of the chosen columns ``[Hkv, S]``."""
    if inputs.positions.dim() == 1:
        return inputs.positions[columns]
    return inputs.positions.gather(1, columns)


def from_columns(heads: Sequence[Tensor], inputs: AttentionInputs, retention: Retention) -> KVSelection:
    """The selection of sorted columns of each KV head, as many as each head has been given."""
    found = [inputs.head_positions(head)[columns] for head, columns in enumerate(heads)]
    return KVSelection.from_heads(found, inputs.length, retention)


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

    @property
    def always_kept(self) -> int:
        """Pairs that are kept whatever their score."""
        return self.sink_tokens + self.recent_window


@dataclass
class ScoredState:
    """Selections made while a forward pass runs, handed over at its end, and what a policy remembers of each layer."""

    pending: dict[int, KVSelection] = field(default_factory=dict)
    notes: dict[int, Any] = field(default_factory=dict)


class ScoredCompressor(DecodeCompressor[ScoredState]):
    """Ranks all stored pairs once at the end of each turn's prefill and keeps the best for the answer.

    A new turn's prefill sees the whole store (retention ``keep``) or the survivors (``evict``); the selection is then made again
    from scratch over history and new turn alike. A method implements ``score``; the other steps are there to be changed by
    methods that need more, and by wrappers.
    """

    signed: ClassVar[bool] = False  # scores may be negative

    class Config(ScoredConfig):
        """Options every scored compressor has."""

    config: ScoredConfig

    @property
    def can_be_weighed(self) -> bool:
        """Whether scores may be multiplied by positive weights without turning their order around."""
        return not self.signed

    @property
    def limits(self) -> ScoredConfig:
        """Budget, forced pairs and retention; a wrapper has those of what it wraps."""
        return self.config

    @abstractmethod
    def score(self, inputs: AttentionInputs) -> Tensor:
        """Importance of each stored pair, ``[Hkv, Tk]``; larger is kept first."""

    def observe(self, inputs: AttentionInputs, state: ScoredState) -> None:
        """Look at any call (each chunk of a prefill, each output) and note in ``state.notes`` what the ranking needs."""

    def ranking(self, inputs: AttentionInputs, state: ScoredState, budget: int) -> Tensor:
        """What the choice of ``budget`` pairs per head goes by, ``[Hkv, Tk]``: the score, unless a method needs more."""
        return self.score(inputs)

    def layer_budget(self, inputs: AttentionInputs) -> int:
        """Pairs per KV head in this layer, on the average over its heads."""
        return self.limits.budget

    def choose(self, inputs: AttentionInputs, ranking: Tensor, budget: int) -> KVSelection | None:
        """The pairs that a ranking makes each head keep; None if all fit."""
        held = inputs.holds.sum(1)
        if int(held.max()) <= budget:
            return None
        columns = select_top(
            ranking,
            budget,
            sink_tokens=self.limits.sink_tokens,
            recent_window=self.limits.recent_window,
            first_valid=inputs.first_valid,
        )
        if inputs.first_valid is None or int(held.min()) >= budget:
            return KVSelection.uniform(to_positions(columns, inputs), inputs.length, self.retention)
        kept = [row[row >= start] for row, start in zip(columns, inputs.first_valid, strict=True)]
        return from_columns(kept, inputs, self.retention)

    def init_state(self) -> ScoredState:
        return ScoredState()

    def after_attention(self, inputs: AttentionInputs, state: ScoredState) -> None:
        self.observe(inputs, state)
        if inputs.phase is not Phase.PREFILL or not inputs.final:
            return
        budget = self.layer_budget(inputs)
        if inputs.total_tokens <= budget:  # nothing to leave out
            return
        chosen = self.choose(inputs, self.ranking(inputs, state, budget), budget)
        if chosen is not None:
            state.pending[inputs.layer.index] = chosen

    def after_forward(self, step: Step, state: ScoredState) -> Selections | None:
        chosen, state.pending = state.pending, {}
        return chosen or None
