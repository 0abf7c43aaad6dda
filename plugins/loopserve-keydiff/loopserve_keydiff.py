"""Implement KeyDiff as in the paper, as a loopserve plugin: one score, one hook."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from loopserve import AttentionInputs, Capabilities, Registry, Retention, ScoredCompressor, ScoredConfig, hookimpl

LOOPSERVE_API = (1, 0)


class BareKeyDiffDecode(ScoredCompressor):
    """Keep the pairs whose keys differ most from the average key, at any position (KeyDiff without forced pairs).

    Paper: https://arxiv.org/abs/2504.15364. Variant, as in kvpress: ``s_t = -cos(K_t, mean_t(K_t / |K_t|))`` per KV
    head, on rotated keys.

    Deviations: pairs are chosen once per turn over all stored pairs, where the paper evicts block by block during
    prefill. The built-in policy ``keydiff`` also keeps sinks and a recent window. Here, as in the paper, no pair is
    kept for its position.

    Multi-turn: scores are computed at the end of each turn's prefill, over the whole history (retention ``keep``) or
    over the survivors (``evict``).
    """

    name: ClassVar[str] = "keydiff_bare"
    paper: ClassVar[str] = "https://arxiv.org/abs/2504.15364"
    capabilities: ClassVar[Capabilities] = Capabilities(retentions=frozenset(Retention))
    signed: ClassVar[bool] = True

    class Config(ScoredConfig):
        sink_tokens: int = Field(0, ge=0, description="First tokens of the conversation that are always kept.")
        recent_window: int = Field(0, ge=0, description="Last tokens of the input that are always kept.")

    config: Config

    def score(self, inputs: AttentionInputs) -> Tensor:
        directions = normalize(inputs.keys.float(), dim=-1)
        if inputs.first_valid is not None:  # columns before it are filler and must not count in the average
            columns = torch.arange(inputs.total_tokens, device=directions.device)
            directions = directions * (columns >= inputs.first_valid[:, None])[..., None]
        # The cosine depends on the direction only, and the sum has the direction of the mean.
        return -cosine_similarity(inputs.keys.float(), directions.sum(dim=1, keepdim=True), dim=-1)


@hookimpl
def loopserve_register_policies(registry: Registry) -> None:
    registry.register(BareKeyDiffDecode)
