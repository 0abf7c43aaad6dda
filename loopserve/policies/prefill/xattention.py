"""Implement XAttention: rank blocks by the sums of their antidiagonals."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn.functional import pad

from loopserve.core.policy.base import PolicyConfig
from loopserve.core.policy.interfaces import AttentionInputs, PrefillSparsifier
from loopserve.core.policy.patterns import AttentionPattern, BlockPattern
from loopserve.policies.blocks import capped, first_and_last, largest_share, visible_blocks


class XAttentionPrefill(PrefillSparsifier):
    """Compute, per block of queries, the key blocks whose antidiagonals hold a share of the attention (XAttention).

    Paper: https://arxiv.org/abs/2503.16428. Variant: stride 8, threshold 0.9, blocks of 128, as in the authors' code: each
    ``stride`` x ``stride`` square is scored by the mean of the products on its antidiagonal, which crosses every vertical and slash
    line; a softmax over the squares of a row of squares, summed by block; per row of blocks the fewest blocks that hold
    ``threshold``. The first block and the queries' own blocks are always computed.

    Deviations: squares of rows count from the first new row, squares of keys from column 0, so no alignment is needed if there are
    fewer queries than keys (the authors pad both). A square counts as visible if its last row sees its first key. The estimate
    costs ``1 / stride`` of dense scores, as in the authors' code.

    Multi-turn: estimated again for each turn over history and turn. Nothing is evicted. After an eviction by a decode policy,
    squares consist of survivors.
    """

    name: ClassVar[str] = "xattention"
    paper: ClassVar[str] = "https://arxiv.org/abs/2503.16428"

    class Config(PolicyConfig):
        threshold: float = Field(
            0.9, gt=0, le=1, description="Share of the estimated attention to cover per block row."
        )
        stride: int = Field(8, gt=0, description="Rows and keys per square; larger is cheaper and coarser.")
        block: int = Field(128, gt=0, description="Rows and keys per block, a multiple of the stride.")

        @model_validator(mode="after")
        def _squares_fill_blocks(self) -> XAttentionPrefill.Config:
            if self.block % self.stride:
                raise ValueError(f"block ({self.block}) must be a multiple of stride ({self.stride})")
            return self

    config: Config

    def sparsify(self, inputs: AttentionInputs) -> AttentionPattern:
        config = self.config
        inputs.record.read("lines", inputs.keys.numel() * inputs.keys.element_size())
        per_block = config.block // config.stride
        mass = torch.stack([self._block_mass(inputs, head, per_block) for head in range(inputs.queries.shape[0])])
        chosen = largest_share(mass, config.threshold) | first_and_last(inputs, config.block)
        blocks = chosen & visible_blocks(inputs, config.block)
        return BlockPattern(blocks, inputs.new_tokens, inputs.total_tokens, config.block)

    def _block_mass(self, inputs: AttentionInputs, head: int, per_block: int) -> Tensor:
        """Return the estimated attention of one head by blocks: ``[query blocks, key blocks]``."""
        stride, holds = self.config.stride, inputs.holds[head // inputs.group]
        keys = inputs.keys[head // inputs.group].float() * holds[:, None]
        # Row r of a square is paired with key stride - 1 - r. With rows and keys concatenated, one product sums an antidiagonal.
        rows = _squares(inputs.queries[head].float(), stride).flatten(1)
        columns = _squares(keys, stride).flip(1).flatten(1)
        logits = capped(rows @ columns.T * (inputs.scaling / stride), inputs.softcap)
        ends = torch.arange(len(rows), device=rows.device) * stride + (stride - 1)
        last = ends.clamp(max=inputs.new_tokens - 1) + (inputs.total_tokens - inputs.new_tokens)
        seen = torch.arange(len(columns), device=rows.device) * stride <= last[:, None]
        seen = seen & _squares(holds[:, None], stride).any(1).flatten()
        spread = logits.masked_fill(~seen, float("-inf")).softmax(-1)
        short = (0, -len(columns) % per_block, 0, -len(rows) % per_block)
        mass: Tensor = pad(spread, short).unflatten(1, (-1, per_block)).unflatten(0, (-1, per_block)).sum((1, 3))
        return mass


def _squares(rows: Tensor, stride: int) -> Tensor:
    """Return ``[T, D]`` in runs of ``stride``, the last filled with zeros: ``[ceil(T / stride), stride, D]``."""
    return pad(rows, (0, 0, 0, -len(rows) % stride)).view(-1, stride, rows.shape[1])
