"""Two policies that work, and what they do instead in a session that is marked: its first message has ``MARKED`` tokens.

An act stands in a policy's way at each of its calls and may do or answer what it likes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from pydantic import Field

from loopserve.core.kv.selection import KVSelection, Retention
from loopserve.core.policy.base import Capabilities, PolicyConfig
from loopserve.core.policy.interfaces import (
    AttentionInputs,
    DecodeCompressor,
    Phase,
    PrefillSparsifier,
    Selections,
    Step,
)
from loopserve.core.policy.patterns import AttentionPattern, LinePattern
from loopserve.core.policy.scoring import ScoredCompressor, ScoredState

MARKED = 41
BUDGET = 12
SEEN: list[int] = []  # what a faulty policy notes for all sessions

Act = Callable[..., Any]


class Windowed(PrefillSparsifier):
    """Sinks and a window."""

    name: ClassVar[str] = "windowed"
    paper: ClassVar[str] = ""

    def __init__(self, act: Act | None = None) -> None:
        """act(policy, inputs, pattern, number of the call): what sparsify answers in a marked session."""
        super().__init__()
        self.act = act

    def sparsify(self, inputs: AttentionInputs) -> AttentionPattern:
        notes = inputs.state
        notes.setdefault("marked", inputs.new_tokens == MARKED)
        notes["calls"] = notes.get("calls", 0) + 1
        sinks = torch.zeros(inputs.queries.shape[0], inputs.total_tokens, dtype=torch.bool)
        sinks[:, :2] = True
        pattern = LinePattern.window(*sinks.shape[:1], inputs.new_tokens, inputs.total_tokens, sinks, 6)
        if self.act is None or not notes["marked"]:
            return pattern
        answer: AttentionPattern = self.act(self, inputs, pattern, notes["calls"])
        return answer


class Halving(DecodeCompressor[dict[str, Any]]):
    """The last positions of the input, every other one; decided once per turn."""

    name: ClassVar[str] = "halving"
    paper: ClassVar[str] = ""
    capabilities: ClassVar[Capabilities] = Capabilities(retentions=frozenset(Retention))

    class Config(PolicyConfig):
        """Options."""

        budget: int = Field(BUDGET, gt=0, description="Pairs.")
        retention: Retention = Field(Retention.KEEP, description="What becomes of the rest.")

    config: Config

    def __init__(self, act: Act | None = None, config: Config | None = None) -> None:
        """act(moment, policy, inputs or step, state, answer, number of the moment's call): what a moment answers."""
        super().__init__(config)
        self.act = act

    def init_state(self) -> dict[str, Any]:
        return {} if self.act is None else self.act("init_state", self, None, {}, {}, 0)

    def _acted(self, moment: str, subject: Any, state: dict[str, Any], answer: Any) -> Any:
        state[moment] = state.get(moment, 0) + 1
        if self.act is None or not state.get("marked"):
            return answer
        return self.act(moment, self, subject, state, answer, state[moment])

    def before_attention(self, inputs: AttentionInputs, state: dict[str, Any]) -> KVSelection | None:
        return self._acted("before_attention", inputs, state, None)

    def after_attention(self, inputs: AttentionInputs, state: dict[str, Any]) -> None:
        state.setdefault("marked", inputs.new_tokens == MARKED)
        self._acted("after_attention", inputs, state, None)

    def after_forward(self, step: Step, state: dict[str, Any]) -> Selections | None:
        answer = None
        if step.phase is Phase.PREFILL and step.final and step.length > BUDGET:
            chosen = torch.arange(step.length - 2 * BUDGET, step.length, 2).clamp(min=0).unique()
            heads = chosen.expand(step.layers[0].kv_heads, -1).contiguous()
            answer = {layer.index: KVSelection.uniform(heads, step.length, self.retention) for layer in step.layers}
        return self._acted("after_forward", step, state, answer)


class NaNScored(ScoredCompressor):
    """Scores that are not numbers, in a marked session."""

    name: ClassVar[str] = "nan_scored"
    paper: ClassVar[str] = ""

    def __init__(self) -> None:
        super().__init__(self.Config(budget=BUDGET, sink_tokens=2, recent_window=4))

    def observe(self, inputs: AttentionInputs, state: ScoredState) -> None:
        state.statistics.setdefault(-1, inputs.new_tokens == MARKED)

    def ranking(self, inputs: AttentionInputs, state: ScoredState, budget: int) -> torch.Tensor:
        scores = self.score(inputs)
        return scores * float("nan") if state.statistics[-1] else scores

    def score(self, inputs: AttentionInputs) -> torch.Tensor:
        return inputs.keys.float().norm(dim=-1)
