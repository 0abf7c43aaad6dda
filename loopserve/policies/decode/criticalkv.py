"""Implement CriticalKV: scores weighed by the effect of a pair's value on the layer's output."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor

from loopserve.core.kv.selection import Retention
from loopserve.core.policy.base import Capabilities
from loopserve.core.policy.interfaces import AttentionInputs
from loopserve.core.policy.layers import Need
from loopserve.core.policy.scoring import ScoredState, best_held
from loopserve.core.policy.wrappers import ScoredWrapper, WrapperConfig

_TOKENS = 512  # tokens whose projected values are in memory at once


class CriticalKVDecode(ScoredWrapper):
    """Keep the best-scored pairs, then those whose score times the size of their projected value is largest (CriticalKV).

    Paper: https://arxiv.org/abs/2502.03805. Variant, as in kvpress: a ``first_stage`` share of the budget is chosen by the inner
    policy's scores, the rest by ``(s + epsilon) * |V W_o|_1``, the norm taken per query head and averaged over the group.

    Deviations: the pairs that the inner policy always keeps are taken first. Inner scores must not be negative. ``knorm`` and
    ``keydiff`` are refused, since the product reverses the order of negative scores (kvpress computes it). With
    ``expected_attention`` inside, set its ``value_norm: false``, or value norms are applied twice.

    Multi-turn: as the inner policy. The norm of a pair never changes, so only the scores differ from turn to turn.
    """

    name: ClassVar[str] = "criticalkv"
    paper: ClassVar[str] = "https://arxiv.org/abs/2502.03805"
    capabilities: ClassVar[Capabilities] = Capabilities(
        retentions=frozenset(Retention), needs=frozenset({Need.OUTPUT_WEIGHT})
    )

    class Config(WrapperConfig):
        epsilon: float = Field(1e-4, ge=0, description="Added to scores before weighing.")
        first_stage: float = Field(0.5, ge=0, le=1, description="Share of the budget that goes by scores alone.")

        @model_validator(mode="after")
        def _scores_can_be_weighed(self) -> CriticalKVDecode.Config:
            if not self.inner.can_be_weighed:
                raise ValueError(
                    f"criticalkv multiplies scores, and those of inner policy {self.inner.name!r} can be negative: "
                    "wrap one whose scores are shares of attention, such as snapkv"
                )
            return self

    config: Config

    def ranking(self, inputs: AttentionInputs, state: ScoredState, budget: int) -> Tensor:
        scores = self.inner.ranking(inputs, state, budget)
        weighed = (scores + self.config.epsilon) * projected_norms(inputs)
        if not self.config.first_stage:
            return weighed
        first = best_held(scores, max(1, int(budget * self.config.first_stage)), first_valid=inputs.first_valid)
        return weighed.masked_fill(first, float("inf"))


def projected_norms(inputs: AttentionInputs) -> Tensor:
    """Return the L1 norm of each value in the model's width, mean over the group: float32 ``[Hkv, Tk]``."""
    assert inputs.layer.parts is not None, "a stack without an output weight is refused when the model is loaded"
    weight = inputs.layer.parts.output_weight().float()  # [Hq, D, E]
    heads, total, _ = inputs.values.shape
    norms = torch.zeros(heads, total, dtype=torch.float32, device=inputs.values.device)
    for query_head, projection in enumerate(weight):
        head = query_head // inputs.group
        for tokens in torch.arange(total, device=norms.device).split(_TOKENS):
            norms[head, tokens] += (inputs.values[head, tokens].float() @ projection).abs().sum(-1)
    return (norms / inputs.group).clamp(min=torch.finfo(norms.dtype).tiny)
