"""Implement FlashPrefill: compute the key blocks whose score is within a threshold of the best block's."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import pad

from loopserve.core.policy.base import PolicyConfig
from loopserve.core.policy.interfaces import AttentionInputs, PrefillSparsifier
from loopserve.core.policy.patterns import AttentionPattern, BlockPattern
from loopserve.policies.blocks import capped, pooled, visible_blocks


class FlashPrefillPrefill(PrefillSparsifier):
    """Compute, per block of queries, the key blocks that score at least ``threshold`` times the best block (FlashPrefill).

    Paper: https://arxiv.org/abs/2603.06199. Variant, after the authors' code: every query against the mean key of each block;
    ``exp(logit - m)`` summed over the rows of a query block, with ``m`` the largest logit of that query block; a row counts for a
    block only if it sees all of it. Nothing is sorted and no running sum is taken. Blocks of the first tokens and of the local
    window are always computed, and every block for the last rows of a turn.

    Deviations: sinks, window and last rows are given in tokens and rounded up to blocks (the authors' 2, 4 and 2 blocks of 128).
    The authors' threshold is a setting of each model (0.18 for Llama); it is the default here. Query blocks count from the first
    new row and key blocks from column 0, so a turn may have any length after any history, where their code is dense if there are
    fewer queries than keys. Their option of a least number of blocks, which they leave at 0, is not there.

    Multi-turn: blocks are scored again for each turn over history and turn, so a later turn can attend to any block. In a chunked
    prefill the last rows are those of the last chunk. Nothing is evicted. After an eviction by a decode policy, blocks consist of
    survivors.
    """

    name: ClassVar[str] = "flashprefill"
    paper: ClassVar[str] = "https://arxiv.org/abs/2603.06199"

    class Config(PolicyConfig):
        threshold: float = Field(
            0.18, gt=0, le=1, description="Share of the best block's score from which on a block is computed."
        )
        block: int = Field(128, gt=0, description="Rows and keys per block.")
        sink_tokens: int = Field(
            256, ge=0, description="First stored tokens whose blocks every block of queries computes."
        )
        local_window: int = Field(
            512, gt=0, description="Tokens of the nearest blocks that are computed, those of the queries included."
        )
        last_rows: int = Field(256, ge=0, description="Last rows of a turn whose blocks compute everything.")

    config: Config

    def sparsify(self, inputs: AttentionInputs) -> AttentionPattern:
        block = self.config.block
        inputs.record.read("lines", inputs.keys.numel() * inputs.keys.element_size())
        means = pooled(inputs.keys, block, inputs.holds)
        visible = visible_blocks(inputs, block)
        scores = torch.stack([self._scores(inputs, head, means) for head in range(inputs.queries.shape[0])])
        best = scores.amax(-1, keepdim=True)
        chosen = (scores >= self.config.threshold * best) & (scores > 0)
        blocks = (chosen | self._always(inputs)) & visible
        return BlockPattern(blocks, inputs.new_tokens, inputs.total_tokens, block)

    def _scores(self, inputs: AttentionInputs, head: int, means: Tensor) -> Tensor:
        """Return the score of each key block for each query block of one head: ``[query blocks, key blocks]``, at most the rows."""
        block, kv_head = self.config.block, head // inputs.group
        logits = inputs.queries[head].float() @ means[kv_head].T * inputs.scaling
        starts = torch.arange(0, inputs.total_tokens, block, device=logits.device)
        whole = starts + block - 1 <= inputs.columns[:, None]  # the row sees the whole block
        real = starts + block > (0 if inputs.first_valid is None else inputs.first_valid[kv_head])
        logits = capped(logits, inputs.softcap).masked_fill(~(whole & real), float("-inf"))
        by_block = pad(logits, (0, 0, 0, -inputs.new_tokens % block), value=float("-inf")).unflatten(0, (-1, block))
        largest = by_block.amax((1, 2), keepdim=True).clamp(min=torch.finfo(logits.dtype).min)
        scores: Tensor = (by_block - largest).exp().sum(1)
        return scores

    def _always(self, inputs: AttentionInputs) -> Tensor:
        """Return the blocks of sinks, window and last rows: bool ``[Hq, query blocks, key blocks]``."""
        config, block, device = self.config, self.config.block, inputs.keys.device
        starts = torch.arange(0, inputs.total_tokens, block, device=device)
        first = torch.zeros(inputs.queries.shape[0], dtype=torch.long, device=device)
        if inputs.first_valid is not None:
            first = inputs.first_valid.repeat_interleave(inputs.group)
        sinks = (starts + block > first[:, None]) & (starts < first[:, None] + config.sink_tokens)
        # The window of a query block reaches back from the block of its first row.
        rows = torch.arange(0, inputs.new_tokens, block, device=device)
        back = max(-(-config.local_window // block) - 1, 0) * block
        window = starts + block > (rows + (inputs.total_tokens - inputs.new_tokens) - back)[:, None]
        whole = -(-config.last_rows // block) if inputs.final else 0
        last = torch.arange(len(rows), device=device) >= len(rows) - whole
        always: Tensor = sinks[:, None] | (window | last[:, None])
        return always
