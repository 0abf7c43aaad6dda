"""Implement Twilight: of the pairs that another policy selects, the fewest that hold a share of the current query's attention."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from loopserve.core.kv.key_summaries import KeySummaries
from loopserve.core.kv.selection import KVSelection, Retention
from loopserve.core.kv.selection_request import SelectionRequest
from loopserve.core.policy.interfaces import AttentionInputs, DecodeCompressor, Observation, Phase, Selections, Step
from loopserve.core.policy.wrappers import AnyInner, InnerConfig, Wrapping


@dataclass
class TwilightState:
    """Hold the state of the policy inside, its selection of each layer, and codes of each layer's keys."""

    inner: Any
    candidates: dict[int, KVSelection] = field(default_factory=dict)
    key_summaries: dict[int, KeySummaries] = field(default_factory=dict)


class TwilightDecode(Wrapping, DecodeCompressor[TwilightState]):
    """Attend in each step to the fewest of another policy's pairs that hold a share ``top_p`` of the current query's attention
    (Twilight).

    Paper: https://arxiv.org/abs/2502.02770. Variant: the inner policy selects generously. The attention of the current query over its
    selection is estimated from codes of the keys, 4 bits per channel as published. Per query head the fewest pairs whose estimated
    weights sum to ``top_p`` are taken, so each head and each step has its own number of pairs.

    Deviations: a KV head attends to the union over its group. The share is found by sorting, where the authors search a threshold.
    What the inner policy attends to besides its selection (this turn's outputs) always stays, and its mass counts. The codes of all
    pairs are read, not only those of the selected ones. While the inner policy selects nothing, all pairs of the input are
    candidates. Policies that evict are refused inside.

    Multi-turn: as the inner policy. What is pruned in one step is a candidate again in the next one.
    """

    name: ClassVar[str] = "twilight"
    paper: ClassVar[str] = "https://arxiv.org/abs/2502.02770"

    class Config(InnerConfig):
        inner: AnyInner = Field(
            description="The policy that selects the candidates, written as {policy: NAME, ...}; give it a generous budget."
        )
        top_p: float = Field(
            0.95, gt=0, le=1, description="Share of the candidates' attention to keep, per query head."
        )
        key_bits: Literal[2, 4, 8] = Field(4, description="Bits per channel of the keys' codes.")
        page: int = Field(64, gt=0, description="Keys that share the range of a code.")

        @model_validator(mode="after")
        def _inner_keeps(self) -> TwilightDecode.Config:
            if self.inner.retention is Retention.EVICT:
                raise ValueError(
                    f"inner policy {self.inner.name!r} evicts what it passes over, but twilight chooses again in each step: "
                    "set its retention to keep"
                )
            return self

    config: Config

    @property
    def inner(self) -> DecodeCompressor[Any]:
        return self.config.inner

    @property
    def most_pairs(self) -> int | None:
        """Set no limit, since the share decides."""
        return None

    @property
    def counts_outputs(self) -> bool:
        return self.inner.counts_outputs

    @property
    def dense_below_tokens(self) -> int:
        return self.inner.dense_below_tokens

    def init_state(self) -> TwilightState:
        return TwilightState(self.inner.init_state())

    def end_turn(self, state: TwilightState) -> None:
        state.candidates.clear()
        self.inner.end_turn(state.inner)

    def held_bytes(self, state: TwilightState) -> int:
        own = sum(each.nbytes for each in state.key_summaries.values() if each.columns)
        return own + self.inner.held_bytes(state.inner)

    def before_attention(self, inputs: AttentionInputs, state: TwilightState) -> KVSelection | None:
        layer = inputs.layer.index
        chosen = self.inner.before_attention(self._unpruned(inputs, state), state.inner)
        if chosen is not None:
            state.candidates[layer] = chosen.make() if isinstance(chosen, SelectionRequest) else chosen
        candidates = state.candidates.get(layer)
        if self.config.top_p == 1:
            return candidates
        boundary = candidates.boundary if candidates is not None else inputs.length - 1 - inputs.output_index
        summaries = self._summaries(inputs, state)
        inputs.record.read("summaries", summaries.nbytes)
        logits = summaries.logits(inputs.queries[:, -1:], inputs.scaling)
        if inputs.softcap:
            logits = inputs.softcap * torch.tanh(logits / inputs.softcap)
        kept = fewest(logits, inputs.attended(candidates), boundary, self.config.top_p)
        inputs.record.mean("kept_pairs", kept.sum(-1).float())
        selection = KVSelection.from_heads([row.nonzero().flatten() for row in kept], boundary)
        return replace(selection, fleeting=True)

    def after_attention(self, inputs: AttentionInputs, state: TwilightState) -> None:
        if inputs.phase is Phase.PREFILL:
            self._summaries(inputs, state)  # updated in prefill, so that the first output does not wait
        self.inner.after_attention(self._unpruned(inputs, state), state.inner)

    def after_forward(self, step: Step, state: TwilightState) -> Selections | Observation | None:
        answer = self.inner.after_forward(step, state.inner)
        if answer is None or isinstance(answer, Observation):
            return answer
        state.candidates.update(answer)
        return None  # pruned by the next step's query, before it is attended to

    def _unpruned(self, inputs: AttentionInputs, state: TwilightState) -> AttentionInputs:
        """Return the call as it would be if the inner policy's selection were attended to whole."""
        return inputs.changed(selection=state.candidates.get(inputs.layer.index))

    def _summaries(self, inputs: AttentionInputs, state: TwilightState) -> KeySummaries:
        """Update the codes of the layer's keys and return them."""
        return inputs.summarised(state.key_summaries, self.config.page, self.config.key_bits)


def fewest(logits: Tensor, candidates: Tensor, boundary: int, top_p: float) -> Tensor:
    """Return the fewest candidates before ``boundary`` that bring each query head to a share ``top_p``: bool ``[Hkv, boundary]``.

    logits ``[Hkv, group, Tk]`` of one query; candidates bool ``[Hkv, Tk]``. All candidates from the boundary on are attended in any
    case. A KV head gets the union over its group. Equal weights: the lowest column first.
    """
    weights = logits.float().masked_fill(~candidates[:, None], float("-inf")).softmax(-1)
    before, held = weights[..., :boundary], weights[..., boundary:].sum(-1, keepdim=True)
    ranked = before.sort(dim=-1, descending=True, stable=True)
    # A pair is needed while those before it, in the order of their weights, do not reach the share.
    needed = held + ranked.values.cumsum(-1) - ranked.values < top_p * (1 - 1e-6)
    taken = torch.zeros_like(needed).scatter_(-1, ranked.indices, needed)
    return taken.any(1) & candidates[:, :boundary]
