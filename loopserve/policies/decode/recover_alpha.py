"""Implement alpha recovery in decoding: per head the fewest pairs that hold a share of the attention."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from loopserve.core.kv.selection import KVSelection
from loopserve.core.policy.base import PolicyConfig
from loopserve.core.policy.interfaces import AttentionInputs, DecodeCompressor, Phase, Selections, Step


@dataclass
class RecoverState:
    """Hold per layer the end of the turn's input, the last output queries ``[Hq, D]``, and a selection not yet returned."""

    ends: dict[int, int] = field(default_factory=dict)
    queries: dict[int, list[Tensor]] = field(default_factory=dict)
    pending: dict[int, KVSelection] = field(default_factory=dict)


class RecoverAlphaDecode(DecodeCompressor[RecoverState]):
    """Attend, per KV head, to the fewest pairs that recover a share ``alpha`` of the attention: LoopServe's prefill rule in
    decoding.

    Paper: https://arxiv.org/abs/2507.13681 for the rule (its phase one), applied to stored pairs instead of lines. The attention of
    the last ``window`` queries, mean over rows and group, is sorted; pairs are taken until they, sinks, recent window and this
    turn's outputs hold ``alpha`` of the total mass. Heads with peaked attention keep few pairs and heads with flat attention many,
    so budgets are ragged and follow from the attention.

    Variant: an interpretation. The share is of the total mass of the softmax over all pairs, not of the largest entry or of an
    approximation. ``most`` bounds the pairs of a head, whatever share they recover (recorded as ``recovered_mass``).

    Multi-turn: chosen at the end of each turn's prefill from that turn's last rows, and every ``interval`` outputs from the
    outputs' own queries over the whole store, so unselected pairs can be selected at any later time. Nothing is evicted.
    """

    name: ClassVar[str] = "recover_alpha"
    paper: ClassVar[str] = "https://arxiv.org/abs/2507.13681"

    class Config(PolicyConfig):
        alpha: float = Field(0.95, gt=0, le=1, description="Share of the observed attention to recover, per KV head.")
        window: int = Field(32, gt=0, description="Last queries of the input that observe.")
        interval: int = Field(16, ge=0, description="Outputs between two selections; 0 = once per turn.")
        least: int = Field(64, ge=1, description="Pairs that every head keeps at least.")
        most: int | None = Field(None, gt=0, description="Pairs that a head keeps at most; none by default.")
        sink_tokens: int = Field(4, ge=0, description="First tokens of the conversation that are always kept.")
        recent_window: int = Field(8, ge=0, description="Last tokens of the input that are always kept.")

    config: Config

    def init_state(self) -> RecoverState:
        return RecoverState()

    def end_turn(self, state: RecoverState) -> None:
        state.queries.clear()

    def after_attention(self, inputs: AttentionInputs, state: RecoverState) -> None:
        layer = inputs.layer.index
        if inputs.phase is Phase.PREFILL and inputs.final:
            state.ends[layer] = inputs.total_tokens
            state.queries[layer] = []
            window = min(self.config.window, inputs.new_tokens)
            self._select(inputs, inputs.queries[:, -window:], inputs.columns[-window:], state)
        elif inputs.phase is Phase.DECODE and self.config.interval:
            held = state.queries.setdefault(layer, [])
            held.append(inputs.queries[:, -1])
            if len(held) == self.config.interval:
                rows = inputs.columns.new_tensor(range(inputs.total_tokens - len(held), inputs.total_tokens))
                self._select(inputs, torch.stack(held, dim=1), rows, state)
                state.queries[layer] = []

    def after_forward(self, step: Step, state: RecoverState) -> Selections | None:
        chosen, state.pending = state.pending, {}
        return chosen or None

    def _select(self, inputs: AttentionInputs, queries: Tensor, columns: Tensor, state: RecoverState) -> None:
        config, end = self.config, state.ends[inputs.layer.index]
        mass = inputs.token_scores(queries, columns)
        forced = torch.zeros(end, dtype=torch.bool, device=mass.device)
        forced[: config.sink_tokens] = True
        forced[max(end - config.recent_window, 0) :] = True
        kept = fewest(mass[:, :end], mass[:, end:].sum(-1), forced, config.alpha, config.least, config.most)
        inputs.record.mean("recovered_mass", (mass[:, :end] * kept).sum(-1) + mass[:, end:].sum(-1))
        inputs.record.mean("kept_pairs", kept.sum(-1).float())
        heads = [row.nonzero().flatten() for row in kept]
        state.pending[inputs.layer.index] = KVSelection.from_heads(heads, end)


def fewest(mass: Tensor, held: Tensor, forced: Tensor, alpha: float, least: int, most: int | None) -> Tensor:
    """Return the fewest columns per head that bring ``held`` ``[H]`` to ``alpha`` of the total: bool ``[H, n]``.

    mass ``[H, n]``, forced bool ``[n]`` columns come first. Equal masses: the lowest column first.
    """
    ranked = mass.masked_fill(forced, float("inf"))
    order = ranked.argsort(dim=-1, descending=True, stable=True)
    reached = held[:, None] + mass.gather(1, order).cumsum(-1)
    wanted = alpha * (held + mass.sum(-1))
    # Rounding must not put the target above the sum of all masses.
    count = (reached < wanted[:, None] * (1 - 1e-6)).sum(-1) + 1
    count = count.clamp(min=max(least, int(forced.sum())), max=mass.shape[1])
    if most is not None:
        count = count.clamp(max=most)
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(mass.shape[1], device=mass.device).expand_as(order))
    return rank < count[:, None]
