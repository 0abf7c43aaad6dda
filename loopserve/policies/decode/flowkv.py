"""Implement FlowKV: each turn's pairs are compressed once, and what was kept of a turn is not compressed again."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from loopserve.core.kv.selection import KVSelection, Retention
from loopserve.core.policy.base import Capabilities
from loopserve.core.policy.interfaces import AttentionInputs, DecodeCompressor, Observation, Selections, Step
from loopserve.core.policy.scoring import ScoredCompressor, ScoredConfig, ScoredState, sound
from loopserve.core.policy.wrappers import WrapperConfig, Wrapping


@dataclass
class FlowKVState:
    """Hold the state of the policy inside, what is kept of the turns so far, and selections not yet returned, by layer."""

    inner: ScoredState
    kept: dict[int, KVSelection] = field(
        default_factory=dict
    )  # up to its boundary, everything has been compressed once
    pending: dict[int, KVSelection] = field(default_factory=dict)


class FlowKVDecode(Wrapping, DecodeCompressor[FlowKVState]):
    """Let another policy compress the newest turn's pairs only, and keep what it kept of the turns before (FlowKV).

    Paper: https://arxiv.org/abs/2505.15347. Variant: at the end of a turn's prefill the pairs that no earlier turn has compressed, the
    last answer and the new input, are ranked by the inner policy, and its budget is what it keeps of them. So the budget counts per
    turn, and a conversation's active set grows with its turns, as in the paper, where a share of each turn is kept.

    Deviations: the paper compresses a turn when it is over and shows the newest question whole; here the newest input is compressed
    before its answer, since a first turn may hold the document. Wraps scored policies. Policies that choose again in each step, such
    as ``quest``, compress nothing for good. The sinks and the recent window of the inner policy are those of each turn.

    Multi-turn: with ``keep`` a new turn's prefill sees the whole history, and its answer attends to what was kept of each turn. With
    ``evict`` later turns see the survivors. A pair that its turn did not keep is not selected again.
    """

    name: ClassVar[str] = "flowkv"
    paper: ClassVar[str] = "https://arxiv.org/abs/2505.15347"
    capabilities: ClassVar[Capabilities] = Capabilities(retentions=frozenset(Retention))

    class Config(WrapperConfig):
        """Take the policy inside."""

    config: Config

    @property
    def inner(self) -> ScoredCompressor:
        return self.config.inner

    @property
    def limits(self) -> ScoredConfig:
        """Return the inner policy's budget and forced pairs, which count per turn."""
        return self.inner.limits

    @property
    def most_pairs(self) -> int | None:
        """Set no limit, since the pairs of all turns add up."""
        return None

    def init_state(self) -> FlowKVState:
        return FlowKVState(self.inner.init_state())

    def end_turn(self, state: FlowKVState) -> None:
        self.inner.end_turn(state.inner)

    def held_bytes(self, state: FlowKVState) -> int:
        return self.inner.held_bytes(state.inner)

    def after_attention(self, inputs: AttentionInputs, state: FlowKVState) -> None:
        self.inner.observe(inputs, state.inner)
        call = self.inner.ranked_call(inputs, state.inner)
        if call is None:
            return
        inputs = call
        layer, budget = inputs.layer.index, self.inner.layer_budget(inputs)
        before = state.kept.get(layer)
        new = min(inputs.length - (before.boundary if before is not None else 0), inputs.total_tokens)
        chosen = None
        if new > budget:
            ranking = sound(self.inner.ranking(inputs, state.inner, budget), inputs)
            chosen = self.inner.choose(newest(inputs, new), ranking[:, -new:], budget)
        found = joined(before, chosen, inputs, self.retention)
        state.kept[layer] = found
        if found.pairs < inputs.keys.shape[0] * inputs.length:
            state.pending[layer] = found

    def after_forward(self, step: Step, state: FlowKVState) -> Selections | Observation | None:
        request = self.inner.asks(step, state.inner)
        if request is not None:
            return request
        chosen, state.pending = state.pending, {}
        return chosen or None


def newest(inputs: AttentionInputs, new: int) -> AttentionInputs:
    """Return a call as if only the last ``new`` columns were stored, which every head holds."""
    return replace(
        inputs,
        queries=inputs.queries[:, -new:],
        keys=inputs.keys[:, -new:],
        values=inputs.values[:, -new:],
        columns=inputs.columns[-new:] - (inputs.total_tokens - new),
        positions=inputs.positions[..., -new:],
        first_valid=None,
        scratch={},
    )


def joined(
    before: KVSelection | None, chosen: KVSelection | None, inputs: AttentionInputs, retention: Retention
) -> KVSelection:
    """Return what earlier turns kept and what was chosen of the positions since, all of those where None is given."""
    start = before.boundary if before is not None else 0
    everything = torch.arange(start, inputs.length, device=inputs.keys.device)
    heads: list[Tensor] = []
    for head in range(inputs.keys.shape[0]):
        fresh = chosen.head(head) if chosen is not None else everything
        heads.append(torch.cat([before.head(head), fresh]) if before is not None else fresh)
    return KVSelection.from_heads(heads, inputs.length, retention)
