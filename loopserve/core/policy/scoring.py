"""Select pairs by a score: budget, sinks, recent window, ties and order, for every compressor that ranks tokens.

Depends on no particular score: a method implements ``score()`` only.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor

from loopserve.core.errors import Fault, PolicyError
from loopserve.core.kv.selection import KVSelection, Retention
from loopserve.core.policy.base import PolicyConfig
from loopserve.core.policy.interfaces import AttentionInputs, DecodeCompressor, Observation, Phase, Selections, Step
from loopserve.kernels.top_columns import top_columns


def to_positions(columns: Tensor, inputs: AttentionInputs) -> Tensor:
    """Return the original positions of the chosen columns ``[Hkv, S]``."""
    if inputs.positions.dim() == 1:
        return inputs.positions[columns]
    return inputs.positions.gather(1, columns)


def from_columns(heads: Sequence[Tensor], inputs: AttentionInputs, retention: Retention) -> KVSelection:
    """Return the selection of sorted columns of each KV head, as many as each head has."""
    positions = [inputs.head_positions(head)[columns] for head, columns in enumerate(heads)]
    return KVSelection.from_heads(positions, inputs.length, retention)


def best_held(
    scores: Tensor, budget: int, limits: ScoredConfig | None = None, first_valid: Tensor | None = None
) -> Tensor:
    """Return the ``budget`` best columns of each head, or all that it holds: bool ``[Hkv, n]``, never filler. limits: the forced
    pairs.
    """
    sinks, recent = (limits.sink_tokens, limits.recent_window) if limits is not None else (0, 0)
    mask = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    starts = first_valid.tolist() if first_valid is not None else [0]
    if len(set(starts)) == 1:
        best = top_columns(scores[:, starts[0] :], budget, sink_tokens=sinks, recent_window=recent)
        return mask.scatter_(1, best + starts[0], True)
    for head, start in enumerate(starts):
        best = top_columns(scores[head : head + 1, start:], budget, sink_tokens=sinks, recent_window=recent)
        mask[head, best[0] + start] = True
    return mask


def sound(scores: Tensor, inputs: AttentionInputs) -> Tensor:
    """Return scores by which pairs can be ranked. Raises PolicyError for a wrong form and for NaN.

    On an accelerator the search for NaN waits for the device, so it runs under strict checks only.
    """
    wanted = inputs.keys.shape[:2]
    if not isinstance(scores, Tensor) or scores.shape != wanted or scores.device != inputs.keys.device:
        actual = f"{list(scores.shape)} on {scores.device}" if isinstance(scores, Tensor) else type(scores).__name__
        raise PolicyError(f"scores must be {list(wanted)} on {inputs.keys.device}, got {actual}")
    looks = inputs.strict or scores.device.type == "cpu"
    if looks and bool(scores.isnan().any()) and bool((scores.isnan() & inputs.holds).any()):
        raise PolicyError("scores hold NaN", Fault.NAN)
    return scores


class ScoredConfig(PolicyConfig):
    """Define the options of every scored compressor."""

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
        """Return the number of pairs that are kept whatever their score is."""
        return self.sink_tokens + self.recent_window


@dataclass
class ScoredState:
    """Hold, by layer, the selections of the current pass and statistics of earlier calls that a score needs.

    statistics: for example the attention that each pair has received (H2O), or moments of the queries (Expected Attention). A
    policy whose statistics are objects names their types in ``state_types``.
    """

    pending: dict[int, KVSelection] = field(default_factory=dict)
    statistics: dict[int, Any] = field(default_factory=dict)


class ScoredCompressor(DecodeCompressor[ScoredState]):
    """Rank all stored pairs once at the end of each turn's prefill and keep the best for the answer.

    A new turn's prefill attends to the whole store (retention ``keep``) or the survivors (``evict``). The selection is then made
    again over history and new turn alike. A method implements ``score``. Methods that need more, and wrappers, override the other
    steps.
    """

    signed: ClassVar[bool] = False  # scores may be negative

    class Config(ScoredConfig):
        """Take the options of every scored compressor."""

    config: ScoredConfig

    @property
    def can_be_weighed(self) -> bool:
        """Return whether scores may be multiplied by positive weights without changing their order."""
        return not self.signed

    @property
    def limits(self) -> ScoredConfig:
        """Return budget, forced pairs and retention. A wrapper returns those of the policy inside."""
        return self.config

    @abstractmethod
    def score(self, inputs: AttentionInputs) -> Tensor:
        """Return the importance of each stored pair, ``[Hkv, Tk]``; larger is kept first."""

    def observe(self, inputs: AttentionInputs, state: ScoredState) -> None:
        """Observe any call (each chunk of a prefill, each output) and keep in ``state.statistics`` what the ranking needs."""

    def ranking(self, inputs: AttentionInputs, state: ScoredState, budget: int) -> Tensor:
        """Return the values by which ``budget`` pairs per head are chosen, ``[Hkv, Tk]``. By default the score."""
        return self.score(inputs)

    def layer_budget(self, inputs: AttentionInputs) -> int:
        """Return the pairs per KV head in this layer, on average over its heads."""
        return self.limits.budget

    def choose(self, inputs: AttentionInputs, ranking: Tensor, budget: int) -> KVSelection | None:
        """Return the pairs that each head keeps under a ranking, or None if all fit."""
        held = inputs.holds.sum(1)
        if int(held.max()) <= budget:
            return None
        if inputs.first_valid is None or int(held.min()) >= budget:
            columns = top_columns(
                ranking,
                budget,
                sink_tokens=self.limits.sink_tokens,
                recent_window=self.limits.recent_window,
                first_valid=inputs.first_valid,
            )
            return KVSelection.uniform(to_positions(columns, inputs), inputs.length, self.retention)
        kept = best_held(ranking, budget, self.limits, inputs.first_valid)
        return from_columns([row.nonzero().flatten() for row in kept], inputs, self.retention)

    def init_state(self) -> ScoredState:
        return ScoredState()

    def ranked_call(self, inputs: AttentionInputs, state: ScoredState) -> AttentionInputs | None:
        """Return the call whose pairs are ranked now, or None to wait. By default the last chunk of a prefill."""
        return inputs if inputs.phase is Phase.PREFILL and inputs.final else None

    def asks(self, step: Step, state: ScoredState) -> Observation | None:
        """Return an observation that must come before the ranking. By default none is needed."""
        return None

    def after_attention(self, inputs: AttentionInputs, state: ScoredState) -> None:
        self.observe(inputs, state)
        call = self.ranked_call(inputs, state)
        if call is None:
            return
        inputs, budget = call, self.layer_budget(call)
        if inputs.total_tokens <= budget:  # nothing is left out
            return
        ranking = sound(self.ranking(inputs, state, budget), inputs)
        chosen = self.choose(inputs, ranking, budget)
        if chosen is not None:
            state.pending[inputs.layer.index] = chosen

    def after_forward(self, step: Step, state: ScoredState) -> Selections | Observation | None:
        request = self.asks(step, state)
        if request is not None:
            return request
        chosen, state.pending = state.pending, {}
        return chosen or None
