"""Implement tri-shape prefill: compute the A-shape, and all cells of the last rows."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from loopserve.core.policy.interfaces import AttentionInputs, PrefillSparsifier
from loopserve.core.policy.patterns import AttentionPattern, DensePattern, LinePattern, RowGroups
from loopserve.policies.lines import sink_lines
from loopserve.policies.prefill.local_window import LocalWindowConfig


class TriShapePrefill(PrefillSparsifier):
    """Compute the A-shape (first tokens and a local window), and the last rows of a turn over everything (Tri-shape).

    Paper: https://arxiv.org/abs/2412.10319 (SCBench). Variant: 100 last rows, as in its code; those rows usually hold the question
    and produce the first token.

    Deviations: SCBench's 128 sinks and 3,968 local tokens are dense below 4k tokens (preset ``tri_shape-paper``), so the local
    default is smaller, and ``local_share`` lets the window grow with the conversation (preset ``tri_shape``). Lines are exact where
    its kernels round to blocks of 64, and queries may be fewer than keys.

    Multi-turn: the last rows of every turn see the whole history, all other new rows sinks and window only. In a chunked prefill
    they are the last rows of the last chunk. After an eviction the pattern covers the survivors.
    """

    name: ClassVar[str] = "tri_shape"
    paper: ClassVar[str] = "https://arxiv.org/abs/2412.10319"

    class Config(LocalWindowConfig):
        last_rows: int = Field(100, gt=0, description="Last rows of a turn that attend to everything.")

    config: Config

    def sparsify(self, inputs: AttentionInputs) -> AttentionPattern:
        config, heads = self.config, inputs.queries.shape[0]
        new, total = inputs.new_tokens, inputs.total_tokens
        whole = min(config.last_rows, new) if inputs.final else 0
        local = config.window(total)
        if whole == new or config.sink_tokens + local >= total:
            return DensePattern(heads, new, total)
        sinks = sink_lines(inputs, config.sink_tokens)[:, : total - whole]
        shape = LinePattern.window(heads, new - whole, total - whole, sinks, local)
        return RowGroups((shape, DensePattern(heads, whole, total))) if whole else shape
