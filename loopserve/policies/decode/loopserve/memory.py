"""What LoopServe's observations said about each token of the conversation, and the selection that follows from it.

Scores are laid out by original position, so layers and heads that hold different pairs (after an eviction) can be
joined.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d, max_pool1d, pad

from loopserve.core.policy.interfaces import AttentionInputs, KVSelection, Retention
from loopserve.kernels.top_columns import top_columns
from loopserve.policies.decode.loopserve.config import LoopServeDecodeConfig, Pool, PoolingKind, Share


def by_position(scores: Tensor, inputs: AttentionInputs) -> Tensor:
    """Scores of columns ``[Hkv, Tk]`` laid out by original position ``[Hkv, length]``; positions no longer held get
    0.
    """
    length = inputs.length
    if inputs.positions.dim() == 1 and length == inputs.total_tokens:
        return scores
    positions = inputs.positions.expand(scores.shape[0], -1)
    held = scores.masked_fill(positions < 0, 0.0)
    return scores.new_zeros(scores.shape[0], length).scatter_add_(1, positions.clamp(min=0), held)


def selected_positions(selection: KVSelection, length: int) -> Tensor:
    """What a selection attends to, its tail included, as a mask over positions: bool ``[Hkv, length]``."""
    mask = torch.zeros(selection.indices.shape[0], length + 1, dtype=torch.bool, device=selection.indices.device)
    mask.scatter_(1, selection.indices + 1, True)  # fillers are -1 and fall into the extra column
    mask = mask[:, 1:]
    mask[:, selection.boundary :] = True
    return mask


def unit_of(config: LoopServeDecodeConfig, layer: int) -> int:
    """The sharing unit a layer belongs to; layers of one unit get one selection (``share: none`` and ``heads``: one
    each).
    """
    if config.share is Share.ALL:
        return 0
    return layer // config.layer_group if config.share is Share.LAYER_GROUPS else layer


@dataclass
class Memory:
    """Scores by sharing unit, each ``[H, length]`` with H = 1 where the heads share, else Hkv."""

    held: dict[int, Tensor] = field(default_factory=dict)  # joined over the turn's observations, each of total 1
    sums: dict[int, Tensor] = field(default_factory=dict)  # the observation under way, summed over layers and heads

    def add(self, config: LoopServeDecodeConfig, layer: int, scores: Tensor) -> None:
        """Take one layer's scores by position ``[Hkv, length]`` into the observation under way."""
        unit, own = unit_of(config, layer), _over_heads(config, scores)
        self.sums[unit] = self.sums[unit] + own if unit in self.sums else own

    def commit(self, decay: float) -> None:
        """End an observation: each unit remembers the larger of it and ``decay`` times what it held. 0 replaces."""
        for unit, scores in self.sums.items():
            self.held[unit] = joined(self.held.get(unit), scores, decay)
        self.sums = {}

    def with_one(self, config: LoopServeDecodeConfig, layer: int, scores: Tensor) -> Tensor:
        """What ``held`` would be for a layer's unit if this layer's scores were the whole observation: ``[H,
        length]``.
        """
        return joined(self.held.get(unit_of(config, layer)), _over_heads(config, scores), config.memory)


def _over_heads(config: LoopServeDecodeConfig, scores: Tensor) -> Tensor:
    return scores if config.share is Share.NONE else scores.sum(0, keepdim=True)


def joined(held: Tensor | None, scores: Tensor, decay: float) -> Tensor:
    """``max(new, decay * held)``, the new observation scaled to total 1 per row; tokens that came later were not
    held.
    """
    new = scores / scores.sum(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).tiny)
    if held is None or decay == 0:
        return new
    return torch.maximum(new, pad(held * decay, (0, new.shape[1] - held.shape[1])))


def choose(config: LoopServeDecodeConfig, scores: Tensor, inputs: AttentionInputs, boundary: int) -> KVSelection | None:
    """The best pairs before ``boundary`` of one layer, from its unit's scores ``[H, length]``; None if all fit the
    budget.
    """
    retention = Retention.EVICT if config.pool is Pool.ACTIVE else Retention.KEEP
    scores = pooled(config, scores[:, :boundary])
    heads = inputs.keys.shape[0]
    if inputs.positions.dim() == 1 and inputs.length == inputs.total_tokens:
        if boundary <= config.dense_tokens:
            return None
        # With a part of the budget for jumps, the selection changes at every step.
        fleeting = config.page_budget > 0
        return KVSelection.uniform(_best(config, scores).expand(heads, -1), boundary, retention, fleeting=fleeting)
    candidates = [row[(row >= 0) & (row < boundary)] for row in inputs.positions.expand(heads, -1)]
    if all(len(each) <= config.dense_tokens for each in candidates):
        return None
    rows = scores.expand(heads, -1)
    best = [each[_best(config, row[each][None])[0]] for row, each in zip(rows, candidates, strict=True)]
    return KVSelection.from_heads(best, boundary, retention)


def _best(config: LoopServeDecodeConfig, scores: Tensor) -> Tensor:
    """Sorted columns ``[H, budget]`` of the best scores ``[H, n]``; the part of the budget for jumps stays free."""
    return top_columns(
        scores,
        config.budget - config.page_budget,
        sink_tokens=config.sink_tokens,
        recent_window=config.recent_window,
    )


def pooled(config: LoopServeDecodeConfig, scores: Tensor) -> Tensor:
    """Scores ``[H, n]`` smoothed over neighbouring tokens, so that the rest of a phrase comes along with its peak."""
    if config.pooling == 1 or scores.shape[1] == 0:
        return scores
    reach = config.pooling // 2
    if config.pooling_kind is PoolingKind.MAXIMUM:
        return max_pool1d(scores[:, None], config.pooling, stride=1, padding=reach)[:, 0]
    return avg_pool1d(scores[:, None], config.pooling, stride=1, padding=reach)[:, 0]


def looked_at_most(config: LoopServeDecodeConfig, importance: Tensor, start: int, length: int) -> Tensor | None:
    """Positions, sorted, of the rows since ``start`` that the last rows look at most (importance ``[length]``).

    The last rows themselves have been observed already; sinks draw attention from everywhere and look at nothing.
    """
    start = max(start, config.sink_tokens)
    candidates = importance[start : max(start, length - config.hop_window)]
    return top_columns(candidates[None], config.hop_rows)[0] + start if len(candidates) else None


def captured_share(scores: Tensor, selection: KVSelection) -> Tensor:
    """Share of the observed mass ``[Hkv, length]`` that a selection and its tail attend to, per KV head ``[Hkv]``."""
    inside = (scores * selected_positions(selection, scores.shape[1])).sum(-1)
    return inside / scores.sum(-1).clamp(min=torch.finfo(scores.dtype).tiny)


def overlap(selection: KVSelection, previous: KVSelection) -> Tensor:
    """Share of each head's selected pairs that were attended before as well ``[Hkv]``."""
    before = selected_positions(previous, max(selection.boundary, previous.boundary))
    kept = before.gather(1, selection.indices.clamp(min=0)) & (selection.indices >= 0)
    return kept.sum(-1).float() / selection.lengths.clamp(min=1)
