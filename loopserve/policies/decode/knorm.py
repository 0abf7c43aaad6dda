"""Implement key norms: keep the pairs with the smallest keys, which tend to get the most attention."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from loopserve.core.kv.selection import Retention
from loopserve.core.policy.base import Capabilities
from loopserve.core.policy.interfaces import AttentionInputs
from loopserve.core.policy.scoring import ScoredCompressor


class KnormDecode(ScoredCompressor):
    """Keep the pairs with the smallest keys; reads no query and computes no attention (L2-norm compression).

    Paper: https://arxiv.org/abs/2406.11430. Variant, as in kvpress: ``s = -|K|`` per KV head, norms in float32.

    Deviations: chosen once per turn. Sinks and a recent window are kept as well (the paper has neither: set both to 0). The paper
    does not compress the first layers; the stack's ``layers`` can except them.

    Multi-turn: scored again at the end of each turn's prefill over history and new turn. The norm of a key never changes, so an
    unselected pair is selected later only if the budget or the other pairs change. With ``evict`` it is removed.
    """

    name: ClassVar[str] = "knorm"
    paper: ClassVar[str] = "https://arxiv.org/abs/2406.11430"
    capabilities: ClassVar[Capabilities] = Capabilities(retentions=frozenset(Retention))
    signed: ClassVar[bool] = True

    def score(self, inputs: AttentionInputs) -> Tensor:
        lengths: Tensor = inputs.keys.float().norm(dim=-1)
        return -lengths
