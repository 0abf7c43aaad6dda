"""Implement AdaKV: one budget for all heads of a layer, spent where the scores are."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from loopserve.core.kv.selection import KVSelection, Retention
from loopserve.core.policy.base import Capabilities
from loopserve.core.policy.interfaces import AttentionInputs
from loopserve.core.policy.scoring import best_held, from_columns
from loopserve.core.policy.wrappers import ScoredWrapper, WrapperConfig


class AdaKVDecode(ScoredWrapper):
    """Give each KV head of a layer its own share of the layer's budget, by comparing scores across heads (AdaKV).

    Paper: https://arxiv.org/abs/2407.11550. Variant, as in kvpress: every head first keeps its ``safeguard`` share of the budget.
    The rest of the layer's ``Hkv * budget`` pairs goes to the best scores over all heads. Wraps any scored policy, whose budget is
    the mean per head.

    Deviations: heads are ragged: with ``evict`` each head's pairs are stored without padding. kvpress keeps all keys and replaces
    some by fake ones, which saves no memory. Sinks and recent window of the inner policy are kept in every head. The authors' code
    pools by maximum and rounds its floor otherwise. Scores that are not shares of attention are compared across heads unscaled.

    Multi-turn: shares are computed again at the end of each turn's prefill, with ``keep`` over the whole history. With ``evict`` a
    head can only keep pairs that it still holds, so a head with a small share in an early turn keeps few old pairs.
    """

    name: ClassVar[str] = "adakv"
    paper: ClassVar[str] = "https://arxiv.org/abs/2407.11550"
    capabilities: ClassVar[Capabilities] = Capabilities(retentions=frozenset(Retention))

    class Config(WrapperConfig):
        safeguard: float = Field(0.2, ge=0, le=1, description="Share of the budget that every head keeps for itself.")

    config: Config

    def choose(self, inputs: AttentionInputs, ranking: Tensor, budget: int) -> KVSelection | None:
        heads, total = ranking.shape
        if int(inputs.holds.sum()) <= heads * budget:
            return None
        limits = self.limits
        safe = min(max(1, int(budget * self.config.safeguard), limits.always_kept), budget)
        first = best_held(ranking, safe, limits, inputs.first_valid)
        scores = ranking.float().nan_to_num(nan=float("-inf"))
        order = scores.masked_fill(first, float("inf")).masked_fill(~inputs.holds, float("-inf"))
        # Ordered by position, then by head, so that of equal scores the lowest position is taken.
        best = order.T.flatten().argsort(descending=True, stable=True)[: heads * budget]
        kept = torch.zeros(heads * total, dtype=torch.bool, device=order.device)
        kept[best] = True
        mask = kept.view(total, heads).T & inputs.holds
        return from_columns([row.nonzero().flatten() for row in mask], inputs, self.retention)
