"""Implement FlexPrefill: choose a kind of pattern per head, then as much of it as holds a share of the attention."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import pad

from loopserve.core.policy.base import PolicyConfig
from loopserve.core.policy.interfaces import AttentionInputs, PrefillSparsifier
from loopserve.core.policy.patterns import AttentionPattern, BlockPattern
from loopserve.policies.blocks import block_attention, first_and_last, largest_share, pooled, visible_blocks


class FlexPrefillPrefill(PrefillSparsifier):
    """Choose per head query-aware blocks where pooled attention is accurate, else vertical and slash lines, as much of either as
    holds a share ``gamma`` of the estimated attention (FlexPrefill).

    Paper: https://arxiv.org/abs/2502.20766. Variant: gamma 0.9, tau 0.1, blocks of 128, as in its README. The last block of queries
    attends to all keys; if the square root of the Jensen-Shannon divergence between its attention by blocks and the estimate from
    pooled queries and keys is below ``tau``, the head is query-aware: the blocks of its pooled map that hold gamma over all query
    blocks together. Otherwise it gets the fewest verticals and, independently, the fewest slashes that hold gamma of the last
    block's attention. The first block and the queries' own blocks are always computed.

    Deviations: a slash that is not at the edge of a block touches two block diagonals. Both are computed, where the authors' code
    takes one and so overestimates the recovered attention. Verticals and slashes are chosen independently and may overlap, as in
    that code (LoopServe counts the overlap once). There may be fewer queries than keys. Query blocks then begin at the first new
    row and need not be aligned with key blocks.

    Multi-turn: everything is estimated again in each turn from its own last block, over history and turn. Nothing is evicted. After
    an eviction by a decode policy, blocks consist of survivors.
    """

    name: ClassVar[str] = "flexprefill"
    paper: ClassVar[str] = "https://arxiv.org/abs/2502.20766"

    class Config(PolicyConfig):
        gamma: float = Field(0.9, gt=0, le=1, description="Share of the estimated attention to cover.")
        tau: float = Field(0.1, ge=0, description="Divergence below which a head is query-aware; 0 = never.")
        block: int = Field(128, gt=0, description="Rows and keys per block.")
        min_budget: int = Field(512, ge=0, description="Lines of either kind, or keys per query, taken at least.")

    config: Config

    def sparsify(self, inputs: AttentionInputs) -> AttentionPattern:
        config = self.config
        last = torch.arange(max(inputs.new_tokens - config.block, 0), inputs.new_tokens, device=inputs.keys.device)
        mass = inputs.row_attention(last, kind="lines")
        queries = pooled(inputs.queries, config.block)
        aware = self._query_aware(inputs, mass.probabilities, pooled(inputs.queries[:, last], len(last)))
        inputs.record.mean("query_aware_heads", aware.float())
        blocks = self._lines(inputs, mass.vertical, mass.slash)
        if bool(aware.any()):
            spread = block_attention(inputs, config.block, queries)
            least = -(-config.min_budget // config.block)
            chosen = largest_share(spread.flatten(1), config.gamma).view_as(spread)
            chosen |= largest_share(spread, 0.0, max(least, 1))
            blocks = torch.where(aware[:, None, None], chosen, blocks)
        blocks = (blocks | first_and_last(inputs, config.block)) & visible_blocks(inputs, config.block)
        return BlockPattern(blocks, inputs.new_tokens, inputs.total_tokens, config.block)

    def _query_aware(self, inputs: AttentionInputs, probabilities: Tensor, query: Tensor) -> Tensor:
        """Return which heads' pooled estimate agrees with their last block's attention: bool ``[Hq]``."""
        block = self.config.block
        true = pad(probabilities, (0, -inputs.total_tokens % block)).unflatten(-1, (-1, block)).sum((1, 3))
        true = true / true.sum(-1, keepdim=True).clamp(min=1e-30)
        estimate = block_attention(inputs, block, query)[:, 0]
        middle = (true + estimate) / 2
        divergence = (_relative_entropy(true, middle) + _relative_entropy(estimate, middle)) / 2
        return divergence.clamp(min=0).sqrt() < self.config.tau

    def _lines(self, inputs: AttentionInputs, vertical: Tensor, slash: Tensor) -> Tensor:
        """Return the blocks that the chosen lines touch: bool ``[Hq, query blocks, key blocks]``."""
        config = self.config
        verticals = largest_share(vertical, config.gamma, config.min_budget)
        slashes = largest_share(slash, config.gamma, config.min_budget)
        return blocks_of_lines(verticals, slashes, inputs.new_tokens, config.block)


def _relative_entropy(one: Tensor, other: Tensor) -> Tensor:
    return torch.where(one > 0, one * (one.clamp(min=1e-30) / other.clamp(min=1e-30)).log(), 0.0).sum(-1)


def blocks_of_lines(verticals: Tensor, slashes: Tensor, new: int, block: int) -> Tensor:
    """Return the blocks in which a line has a causal cell; verticals and slashes bool ``[Hq, n]``."""
    heads, total = verticals.shape
    rows, columns = -(-new // block), -(-total // block)
    padded = pad(verticals, (0, columns * block - total)).view(heads, columns, block).any(2)
    blocks = padded[:, None].expand(heads, rows, columns).clone()
    first = torch.arange(rows, device=verticals.device) * block + (
        total - new
    )  # columns of each block's first and last row
    last = (first + block - 1).clamp(max=total - 1)
    start = torch.arange(columns, device=verticals.device) * block
    end = (start + block - 1).clamp(max=total - 1)
    # The offsets of a block's cells range from its upper right corner (first row, last column) to its lower left one.
    low = (first[:, None] - end).clamp(min=0)
    high = last[:, None] - start
    below = pad(slashes.cumsum(1), (1, 0))
    touched = below[:, (high + 1).clamp(min=0, max=total)] > below[:, low]
    return (blocks | touched) & (high >= 0)
