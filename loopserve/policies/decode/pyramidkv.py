"""Implement PyramidKV: more pairs in low layers, fewer in high ones."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import Tensor

from loopserve.core.kv.selection import KVSelection, Retention
from loopserve.core.policy.base import Capabilities
from loopserve.core.policy.interfaces import AttentionInputs
from loopserve.core.policy.scoring import ScoredState
from loopserve.core.policy.wrappers import ScoredWrapper, WrapperConfig


class PyramidKVDecode(ScoredWrapper):
    """Give low layers more of the budget and high layers less, in equal steps (PyramidKV).

    Paper: https://arxiv.org/abs/2406.02069. Variant, as in kvpress: with n pairs per head on average, the last layer gets ``n /
    beta`` and the first ``2 n - n / beta``. If the first would exceed the tokens so far minus ``window``, both move towards the
    mean. If a layer would fall below ``window``, all get n. Budgets are rounded to whole pairs, so their mean can differ from n by
    half a pair. The inner policy (SnapKV in the paper) chooses within each layer.

    Deviations: layers are counted among those that this policy selects for, so sliding-window layers and layers that the stack
    excepts do not distort the pyramid. The authors' code adds the window on top of the budget.

    Multi-turn: the budgets are the same in every turn once the conversation is longer than the largest one. Unselected pairs follow
    the inner policy's retention, so with ``evict`` high layers lose pairs sooner.
    """

    name: ClassVar[str] = "pyramidkv"
    paper: ClassVar[str] = "https://arxiv.org/abs/2406.02069"
    capabilities: ClassVar[Capabilities] = Capabilities(retentions=frozenset(Retention))

    class Config(WrapperConfig):
        beta: int = Field(
            20, ge=1, description="Steepness: the last layer gets the mean over this; 1 = all get the same."
        )
        window: int | None = Field(
            None, gt=0, description="Least budget of a layer; by default what the inner policy always keeps."
        )

    config: Config

    @property
    def most_pairs(self) -> int | None:
        """Return the first layer's budget, which is at most twice the mean."""
        mean = self.inner.most_pairs
        return None if mean is None else 2 * mean

    def layer_budget(self, inputs: AttentionInputs) -> int:
        mean = self.inner.layer_budget(inputs)
        layers = [each.index for each in inputs.compressor_layers]
        # Computed from the length of the conversation, which all layers share. After an eviction they hold different numbers of pairs.
        if inputs.layer.index not in layers or inputs.length <= mean:
            return mean
        window = self.config.window or max(1, self.limits.always_kept)
        return pyramid(inputs.length, mean, window, self.config.beta, len(layers))[layers.index(inputs.layer.index)]

    def ranking(self, inputs: AttentionInputs, state: ScoredState, budget: int) -> Tensor:
        return self.inner.ranking(inputs, state, budget)

    def choose(self, inputs: AttentionInputs, ranking: Tensor, budget: int) -> KVSelection | None:
        return self.inner.choose(inputs, ranking, budget)


def pyramid(total: int, mean: int, window: int, beta: int, layers: int) -> list[int]:
    """Return the budgets of ``layers`` layers, the first first, for ``total`` tokens so far and a mean budget."""
    least = mean / beta
    most = 2 * mean - least
    if most >= total - window:
        most = total - window
        least = 2 * mean - most
    if layers == 1 or not total >= most >= least >= window:
        return [max(1, mean)] * layers
    return [round(most - index * (most - least) / (layers - 1)) for index in range(layers)]
