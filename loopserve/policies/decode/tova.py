"""Implement TOVA: keep what the last token attends to."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import Tensor

from loopserve.core.kv.selection import Retention
from loopserve.core.policy.base import Capabilities
from loopserve.core.policy.interfaces import AttentionInputs, Phase
from loopserve.core.policy.scoring import ScoredState
from loopserve.policies.attended import attention_over
from loopserve.policies.decode.rolling import RollingCompressor, RollingConfig


class TOVADecode(RollingCompressor):
    """Keep the pairs that the last token attends to most, and drop the least one with each output (TOVA).

    Paper: https://arxiv.org/abs/2401.06104. Variant, as in kvpress at the end of a prompt: the softmax of the last query, mean over
    all query heads of the layer, one selection for all KV heads. The last token is kept. During the answer, each output drops the
    pair to which its query attends least among those still attended, as published.

    Deviations: the paper bounds the cache during the prefill too, token by token. Here the prefill attends to the whole prompt. No
    sinks and no window by default, as published.

    Multi-turn: selected again at the end of each turn's prefill. With ``keep`` that prefill sees the whole history and any pair can
    be selected again. With ``evict``, as published, it sees the survivors.
    """

    name: ClassVar[str] = "tova"
    paper: ClassVar[str] = "https://arxiv.org/abs/2401.06104"
    capabilities: ClassVar[Capabilities] = Capabilities(retentions=frozenset(Retention))

    class Config(RollingConfig):
        sink_tokens: int = Field(0, ge=0, description="First tokens of the conversation that are always kept.")
        recent_window: int = Field(1, ge=0, description="Last tokens that are always kept.")

    config: Config

    def score(self, inputs: AttentionInputs) -> Tensor:
        attention = inputs.token_scores(inputs.queries[:, -1:], inputs.columns[-1:])
        return _over_heads(inputs, attention)

    def ranking(self, inputs: AttentionInputs, state: ScoredState, budget: int) -> Tensor:
        if inputs.phase is Phase.DECODE:
            return _over_heads(inputs, attention_over(inputs, inputs.attended(inputs.selection)))
        return self.score(inputs)


def _over_heads(inputs: AttentionInputs, scores: Tensor) -> Tensor:
    """Return the mean over the KV heads ``[Hkv, Tk]``, where all hold the same pairs; else each head's own scores.

    Heads hold the same pairs unless a wrapper gave each its own budget.
    """
    positions = inputs.positions
    if positions.dim() == 2 and not bool((positions == positions[:1]).all()):
        return scores
    return scores.mean(0, keepdim=True).expand_as(scores)
