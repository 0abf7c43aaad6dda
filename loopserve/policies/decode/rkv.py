"""Implement R-KV: keep pairs that are attended to and unlike the other pairs, and rank again every so many outputs."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import max_pool1d, normalize

from loopserve.core.kv.selection import Retention
from loopserve.core.policy.base import Capabilities
from loopserve.core.policy.interfaces import AttentionInputs, Phase
from loopserve.core.policy.scoring import ScoredCompressor, ScoredState, sound
from loopserve.policies.decode.observation_window import ObservationWindowConfig
from loopserve.policies.decode.rolling import among

_ROWS = 512  # keys whose similarity to all keys of a head is in memory at once


class RKVDecode(ScoredCompressor):
    """Keep the pairs that the last queries attend to and whose keys are unlike others, and choose again every few outputs (R-KV).

    Paper: https://arxiv.org/abs/2505.24133. Variant: importance is the softmax of the last ``window`` queries over the pairs before
    them, of the largest logit in a group, mean over the queries, then the maximum over ``kernel`` neighbours. Redundancy is the mean
    cosine similarity of a pair's key to all others, as a softmax over the pairs; the latest of the keys similar to a key (above
    ``threshold``) is not counted as redundant to it. The score is ``mix * importance - (1 - mix) * redundancy``. The window is always
    kept. Every ``interval`` outputs, input and outputs are reduced to the budget again; until then outputs are attended in addition.

    Deviations: the first choice is made at the end of the input, which the paper decodes whole while it is shorter than budget and
    buffer. A key without any similar one excuses none; the authors' code excuses the first token then. With ``keep``, pairs that an
    answer dropped come back with the next turn; the authors evict (preset ``rkv``).

    Multi-turn: chosen at the end of each turn's prefill over history and new turn, and within the answer among the pairs still
    attended. With ``evict`` later turns see the survivors, whose redundancy is measured among themselves.
    """

    name: ClassVar[str] = "rkv"
    paper: ClassVar[str] = "https://arxiv.org/abs/2505.24133"
    capabilities: ClassVar[Capabilities] = Capabilities(retentions=frozenset(Retention))
    signed: ClassVar[bool] = True

    class Config(ObservationWindowConfig):
        window: int = Field(8, gt=0, description="Last queries that observe; their own pairs are always kept.")
        interval: int = Field(128, ge=0, description="Outputs between two choices; 0 = once per turn.")
        mix: float = Field(0.1, ge=0, le=1, description="Weight of importance; the rest is the weight of redundancy.")
        threshold: float = Field(0.5, ge=0, le=1, description="Cosine similarity above which two keys are similar.")
        kernel: int = Field(7, gt=0, description="Width of the maximum pooling of importance; odd, 1 = none.")

    config: Config

    def end_turn(self, state: ScoredState) -> None:
        state.statistics.clear()  # the last queries observe one turn

    def score(self, inputs: AttentionInputs) -> Tensor:
        return self._score(inputs, inputs.queries[:, -self.config.window :], inputs.holds)

    def observe(self, inputs: AttentionInputs, state: ScoredState) -> None:
        if inputs.phase is Phase.OBSERVE:
            return
        held = state.statistics.get(inputs.layer.index, inputs.queries[:, :0])
        fresh = inputs.queries[:, -self.config.window :]
        state.statistics[inputs.layer.index] = (
            torch.cat([held, fresh], dim=1)[:, -self.config.window :].detach().clone()
        )

    def ranking(self, inputs: AttentionInputs, state: ScoredState, budget: int) -> Tensor:
        decoding = inputs.phase is Phase.DECODE
        among_these = inputs.attended(inputs.selection) if decoding else inputs.holds
        return self._score(inputs, state.statistics[inputs.layer.index], among_these)

    def after_attention(self, inputs: AttentionInputs, state: ScoredState) -> None:
        if inputs.phase is not Phase.DECODE:
            super().after_attention(inputs, state)
            return
        self.observe(inputs, state)
        if not self.config.interval or (inputs.output_index + 1) % self.config.interval:
            return
        here, budget = inputs.attended(inputs.selection), self.layer_budget(inputs)
        if int(here.sum(1).max()) > budget:
            ranking = sound(self.ranking(inputs, state, budget), inputs)
            state.pending[inputs.layer.index] = among(self.limits, ranking, here, budget, inputs, self.retention)

    def _score(self, inputs: AttentionInputs, queries: Tensor, here: Tensor) -> Tensor:
        """Return the scores of the columns ``here``, bool ``[Hkv, Tk]``, by the last queries ``[Hq, w, D]``; 0 for the others.

        The queries' own pairs are the last w columns, since the window is always kept.
        """
        config, window = self.config, queries.shape[1]
        inputs.record.read("scoring", int(here.sum()) * inputs.keys.shape[2] * inputs.keys.element_size())
        scores = torch.zeros(here.shape, dtype=torch.float32, device=inputs.keys.device)
        for head, row in enumerate(here):
            columns = row.nonzero().flatten()
            keys = inputs.keys[head, columns].float()
            own = queries[head * inputs.group : (head + 1) * inputs.group].float()
            logits = own @ keys[: len(keys) - window].T * inputs.scaling
            if inputs.softcap:
                logits = inputs.softcap * torch.tanh(logits / inputs.softcap)
            found = pooled(logits.amax(0).softmax(-1).mean(0), config.kernel) * config.mix
            found = found - (1 - config.mix) * redundancy(keys, config.threshold)[: len(found)]
            scores[head, columns[: len(found)]] = found
            scores[head, columns[len(found) :]] = float("inf")
        return scores


def pooled(importance: Tensor, kernel: int) -> Tensor:
    """Return the maximum of each of n values ``[n]`` and its neighbours."""
    if kernel == 1 or not len(importance):
        return importance
    return max_pool1d(importance[None, None], kernel, stride=1, padding=kernel // 2)[0, 0]


def redundancy(keys: Tensor, threshold: float) -> Tensor:
    """Return how much each key of a head ``[n, D]`` is like the others, as shares of 1: float32 ``[n]``.

    The latest of the keys that are similar to a key is not counted against that key.
    """
    directions = normalize(keys.float(), dim=-1)
    sums = torch.zeros(len(keys), dtype=torch.float32, device=keys.device)
    places = torch.arange(len(keys), device=keys.device)
    for rows in places.split(_ROWS):
        alike = directions[rows] @ directions.T
        alike[places[: len(rows)], rows] = 0.0
        latest = torch.where(alike > threshold, places, -1).amax(-1, keepdim=True)
        excused = alike.gather(1, latest.clamp(min=0)).masked_fill(latest < 0, 0.0)
        sums += alike.sum(0)
        sums.scatter_add_(0, latest.clamp(min=0).flatten(), -excused.flatten())
    return (sums / len(keys)).softmax(-1)
