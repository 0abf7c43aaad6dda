"""Implement KeyDiff: keep keys unlike the others."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from loopserve.core.kv.selection import Retention
from loopserve.core.policy.base import Capabilities
from loopserve.core.policy.interfaces import AttentionInputs
from loopserve.core.policy.scoring import ScoredCompressor


class KeyDiffDecode(ScoredCompressor):
    """Keep the pairs whose keys differ most from the average key; reads no query and computes no attention (KeyDiff).

    Paper: https://arxiv.org/abs/2504.15364. Variant, as in kvpress: ``s = -cos(K, mean(K / |K|))`` per KV head, on rotated keys.

    Deviations: chosen once per turn over all stored pairs, where the paper evicts block by block during the prefill. Sinks and a
    recent window are kept as well (the paper has neither: set both to 0).

    Multi-turn: the average is taken over history and new turn, so each turn scores all pairs again. With ``evict`` it is taken over
    the survivors, which already differ from each other.
    """

    name: ClassVar[str] = "keydiff"
    paper: ClassVar[str] = "https://arxiv.org/abs/2504.15364"
    capabilities: ClassVar[Capabilities] = Capabilities(retentions=frozenset(Retention))
    signed: ClassVar[bool] = True

    def score(self, inputs: AttentionInputs) -> Tensor:
        keys = inputs.keys.float()
        directions = normalize(keys, dim=-1) * inputs.holds[..., None]  # filler must not count in the average
        # The sum has the direction of the mean, and the cosine depends on nothing else.
        return -cosine_similarity(keys, directions.sum(1, keepdim=True), dim=-1)
