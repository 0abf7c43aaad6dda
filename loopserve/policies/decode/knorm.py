"""Implement key norms: small keys attract attention."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from loopserve.core.policy.interfaces import AttentionInputs, Capabilities, Retention
from loopserve.core.policy.scoring import ScoredCompressor


class KnormDecode(ScoredCompressor):
    """Keep the pairs with the smallest keys; reads no query and computes no attention (L2-norm compression).

    Paper: https://arxiv.org/abs/2406.11430. Variant, as in kvpress: ``s = -|K|`` per KV head, norms in float32.

    Deviations: chosen once per turn; sinks and a recent window are kept besides (the paper has neither: set both to 0).
    The first layers, which the paper leaves whole, are a matter of the stack's ``layers``.

    Multi-turn: scored anew at the end of each turn's prefill over history and new turn; a key's norm never changes, so a
    pair once passed over comes back only when the budget or the competition changes. With ``evict`` it is gone.
    """

    name: ClassVar[str] = "knorm"
    paper: ClassVar[str] = "https://arxiv.org/abs/2406.11430"
    capabilities: ClassVar[Capabilities] = Capabilities(retentions=frozenset(Retention))
    signed: ClassVar[bool] = True

    def score(self, inputs: AttentionInputs) -> Tensor:
        lengths: Tensor = inputs.keys.float().norm(dim=-1)
        return -lengths
