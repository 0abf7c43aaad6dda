"""Implement MInference: compute a number of vertical and slash lines per head that a search has determined."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field

from loopserve.core.policy.base import PolicyConfig
from loopserve.core.policy.interfaces import AttentionInputs, PrefillSparsifier
from loopserve.core.policy.layers import LayerSpec
from loopserve.core.policy.patterns import AttentionPattern, LinePattern
from loopserve.policies.head_files import misfit
from loopserve.policies.lines import heaviest, scaled_count, sink_lines
from loopserve.policies.prefill.line_sizes import LineSizes, read_sizes


class MInferencePrefill(PrefillSparsifier):
    """Compute a number of vertical and slash lines per head that is fixed beforehand; the last rows of the turn choose which
    (MInference, vertical-slash).

    Paper: https://arxiv.org/abs/2407.02490. Variant: the softmax of the last 64 rows gives each line its mass; the heaviest
    ``vertical_size`` and ``slash_size`` are taken, the first 30 columns and last 100 offsets forced among them, as in the authors'
    code. Sizes differ per head by a file, which ``loopserve policies search-minference`` makes for a model.

    Deviations: the authors' sizes (1000 and 6096, preset ``minference-paper``) are dense at a few thousand tokens, so the shares let
    sizes of heads that no file names grow with the conversation up to them (preset ``minference``). Of the three patterns only
    vertical-slash is implemented, which the authors' files assign to nearly every head. Lines have exact length, where their kernel
    widens a slash to blocks of 64. A turn may have any length after any history, where their code is dense if there are fewer
    queries than keys.

    Multi-turn: each turn chooses lines again from its own last rows, over history and turn. Without shares sizes stay the same, so
    density falls as the history grows; with shares sizes grow with it. Nothing is evicted. After an eviction by a decode policy,
    lines are those of the survivors' columns.
    """

    name: ClassVar[str] = "minference"
    paper: ClassVar[str] = "https://arxiv.org/abs/2407.02490"

    class Config(PolicyConfig):
        vertical_size: int = Field(1000, gt=0, description="Vertical lines per head that the file does not name.")
        slash_size: int = Field(6096, gt=0, description="Slash lines per head that the file does not name.")
        vertical_share: float | None = Field(
            None,
            gt=0,
            le=1,
            description="Verticals as a share of the stored pairs, at most `vertical_size`; none by default.",
        )
        slash_share: float | None = Field(
            None,
            gt=0,
            le=1,
            description="Slashes as a share of the stored pairs, at most `slash_size`; none by default.",
        )
        sizes: str | None = Field(
            None,
            description="YAML or JSON file with sizes per head, as `loopserve policies search-minference` writes it.",
        )
        last_rows: int = Field(64, gt=0, description="Last rows of the turn whose attention chooses the lines.")
        sink_tokens: int = Field(30, ge=0, description="First stored tokens that are always among the verticals.")
        local_window: int = Field(100, gt=0, description="Nearest offsets that are always among the slashes.")

    config: Config

    def __init__(self, config: PolicyConfig | None = None) -> None:
        super().__init__(config)
        self.sizes: LineSizes = read_sizes(self.config.sizes) if self.config.sizes else {}

    def refuses(self, layer: LayerSpec) -> str | None:
        if not self.sizes:
            return None
        return misfit(self.sizes, layer.index, layer.query_heads, self.config.sizes, kind="sizes", searched=True)

    def sparsify(self, inputs: AttentionInputs) -> AttentionPattern:
        config, heads = self.config, inputs.queries.shape[0]
        rows = torch.arange(max(inputs.new_tokens - config.last_rows, 0), inputs.new_tokens, device=inputs.keys.device)
        mass = inputs.row_attention(rows, kind="lines")
        vertical = scaled_count(config.vertical_size, config.vertical_share, 1, inputs.total_tokens)
        slash = scaled_count(config.slash_size, config.slash_share, 1, inputs.total_tokens)
        sizes = self.sizes.get(inputs.layer.index) or [(vertical, slash)] * heads
        wanted = torch.tensor(sizes, dtype=torch.long, device=inputs.keys.device)
        offsets = torch.arange(inputs.total_tokens, device=inputs.keys.device)
        near = (offsets < config.local_window).expand(heads, -1)
        verticals = heaviest(mass.vertical, wanted[:, 0], sink_lines(inputs, config.sink_tokens))
        slashes = heaviest(mass.slash, wanted[:, 1], near)
        return LinePattern(verticals, slashes, inputs.new_tokens)
