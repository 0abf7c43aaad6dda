"""Accumulate the scores of LoopServe's observations for each token, and choose a selection by them.

Scores are laid out by original position, so layers and heads that hold different pairs (after an eviction) can be joined.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d, max_pool1d, pad

from loopserve.core.kv.selection import KVSelection, Retention
from loopserve.core.policy.interfaces import AttentionInputs
from loopserve.kernels.top_columns import top_columns
from loopserve.policies.decode.loopserve.config import LoopServeDecodeConfig, Pool, PoolingKind, Share


def by_position(scores: Tensor, inputs: AttentionInputs) -> Tensor:
    """Return scores of columns ``[Hkv, Tk]`` by original position ``[Hkv, length]``; positions no longer held get 0."""
    length = inputs.length
    if inputs.nothing_evicted:
        return scores
    positions = inputs.positions.expand(scores.shape[0], -1)
    held = scores.masked_fill(positions < 0, 0.0)
    return scores.new_zeros(scores.shape[0], length).scatter_add_(1, positions.clamp(min=0), held)


def unit_of(config: LoopServeDecodeConfig, layer: int) -> int:
    """Return the sharing unit of a layer. Layers of one unit get one selection (``share: none`` and ``heads``: one each)."""
    if config.share is Share.ALL:
        return 0
    return layer // config.layer_group if config.share is Share.LAYER_GROUPS else layer


@dataclass
class ScoreAccumulator:
    """Accumulate scores over a turn's observations by sharing unit, ``[H, length]`` each; H = 1 where heads share, else Hkv.

    accumulated: the decaying maximum over the observations, each scaled to total 1. current: the current observation, summed over
    layers and heads.
    """

    accumulated: dict[int, Tensor] = field(default_factory=dict)
    current: dict[int, Tensor] = field(default_factory=dict)

    def add(self, config: LoopServeDecodeConfig, layer: int, scores: Tensor) -> None:
        """Add one layer's scores by position ``[Hkv, length]`` to the current observation."""
        unit, own = unit_of(config, layer), _over_heads(config, scores)
        self.current[unit] = self.current[unit] + own if unit in self.current else own

    def commit(self, decay: float) -> None:
        """End an observation: accumulate the larger of it and ``decay`` times the scores before it. 0 replaces them."""
        for unit, scores in self.current.items():
            self.accumulated[unit] = joined(self.accumulated.get(unit), scores, decay)
        self.current = {}

    def with_one(self, config: LoopServeDecodeConfig, layer: int, scores: Tensor) -> Tensor:
        """Return ``accumulated`` of a layer's unit as if this layer's scores were the whole observation: ``[H, length]``."""
        return joined(self.accumulated.get(unit_of(config, layer)), _over_heads(config, scores), config.memory)


def _over_heads(config: LoopServeDecodeConfig, scores: Tensor) -> Tensor:
    return scores if config.share is Share.NONE else scores.sum(0, keepdim=True)


def joined(before: Tensor | None, scores: Tensor, decay: float) -> Tensor:
    """Return ``max(new, decay * before)``, the new observation scaled to total 1 per row. Later tokens had no score before."""
    new = scores / scores.sum(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).tiny)
    if before is None or decay == 0:
        return new
    return torch.maximum(new, pad(before * decay, (0, new.shape[1] - before.shape[1])))


def choose(config: LoopServeDecodeConfig, scores: Tensor, inputs: AttentionInputs, boundary: int) -> KVSelection | None:
    """Return the best pairs before ``boundary`` of one layer, by its unit's scores ``[H, length]``, or None if all fit the budget."""
    retention = Retention.EVICT if config.pool is Pool.ACTIVE else Retention.KEEP
    scores = pooled(config, scores[:, :boundary])
    heads = inputs.keys.shape[0]
    if inputs.nothing_evicted:
        if boundary <= config.budget:
            return None
        # If a part of the budget is left for jumps, the selection changes at every step.
        fleeting = config.page_budget > 0
        return KVSelection.uniform(_best(config, scores).expand(heads, -1), boundary, retention, fleeting=fleeting)
    candidates = [row[(row >= 0) & (row < boundary)] for row in inputs.positions.expand(heads, -1)]
    if all(len(each) <= config.budget for each in candidates):
        return None
    rows = scores.expand(heads, -1)
    best = [each[_best(config, row[each][None])[0]] for row, each in zip(rows, candidates, strict=True)]
    return KVSelection.from_heads(best, boundary, retention)


def _best(config: LoopServeDecodeConfig, scores: Tensor) -> Tensor:
    """Return the sorted columns ``[H, budget]`` of the best scores ``[H, n]``; the part of the budget for the current query stays
    free.
    """
    return top_columns(
        scores,
        config.budget - config.page_budget,
        sink_tokens=config.sink_tokens,
        recent_window=config.recent_window,
    )


def pooled(config: LoopServeDecodeConfig, scores: Tensor) -> Tensor:
    """Return scores ``[H, n]`` smoothed over neighbouring tokens, so that the rest of a phrase is selected with its peak."""
    if config.pooling == 1 or scores.shape[1] == 0:
        return scores
    reach = config.pooling // 2
    if config.pooling_kind is PoolingKind.MAXIMUM:
        return max_pool1d(scores[:, None], config.pooling, stride=1, padding=reach)[:, 0]
    return avg_pool1d(scores[:, None], config.pooling, stride=1, padding=reach)[:, 0]


def looked_at_most(config: LoopServeDecodeConfig, importance: Tensor, start: int, length: int) -> Tensor | None:
    """Return the positions, sorted, of the rows since ``start`` that the last rows attend to most (importance ``[length]``).

    The last rows have been observed already. Sinks are left out, since they get attention from all rows whatever the question is.
    """
    start = max(start, config.sink_tokens)
    candidates = importance[start : max(start, length - config.hop_window)]
    return top_columns(candidates[None], config.hop_rows)[0] + start if len(candidates) else None


def captured_share(scores: Tensor, selection: KVSelection) -> Tensor:
    """Return the share of the observed mass ``[Hkv, length]`` that a selection and its tail attend to, per KV head ``[Hkv]``."""
    inside = (scores * selection.attended_positions(scores.shape[1])).sum(-1)
    return inside / scores.sum(-1).clamp(min=torch.finfo(scores.dtype).tiny)


def overlap(selection: KVSelection, previous: KVSelection) -> Tensor:
    """Return the share of each head's selected pairs that were attended before as well ``[Hkv]``."""
    before = previous.attended_positions(max(selection.boundary, previous.boundary))
    kept = before.gather(1, selection.indices.clamp(min=0)) & (selection.indices >= 0)
    return kept.sum(-1).float() / selection.lengths.clamp(min=1)
