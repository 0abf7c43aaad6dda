"""Implement static lines: choose lines in the first turn and keep them, as a baseline for LoopServe's choice in every turn."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import pad

from loopserve.core.policy.base import Capabilities, PolicyConfig
from loopserve.core.policy.interfaces import AttentionInputs, PrefillSparsifier
from loopserve.core.policy.layers import LayerSpec, Need
from loopserve.core.policy.patterns import AttentionPattern, LinePattern
from loopserve.kernels.select_lines import select_lines
from loopserve.policies.draws import Sampling, generator, sample_rows
from loopserve.policies.head_files import misfit
from loopserve.policies.lines import sink_lines
from loopserve.policies.prefill.given_lines import GivenLines, read_lines


class StaticLinesPrefill(PrefillSparsifier):
    """Keep the vertical and slash lines of the first turn, or of a file, for the whole conversation: LoopServe's choice, but not
    online.

    Paper: https://arxiv.org/abs/2507.13681, the ablation of its first phase. The first turn chooses lines as ``loopserve`` does
    (sampled rows, gain per cost, overlap counted once, until ``alpha``); later turns compute the same columns and offsets, sinks
    and local window.

    Variant: not published. Columns are positions in the conversation, so a later turn's own tokens are verticals only if the file
    names them. A first turn with several chunks chooses in each of them, and the lines of its last chunk are kept.

    Multi-turn: a new turn attends to the lines of the first one, to sinks and to its local window. It needs every pair of the
    conversation, since offsets and positions are not defined among survivors. A stack that evicts is refused.
    """

    name: ClassVar[str] = "static_lines"
    paper: ClassVar[str] = "https://arxiv.org/abs/2507.13681"
    capabilities: ClassVar[Capabilities] = Capabilities(needs=frozenset({Need.FULL_HISTORY}))

    class Config(PolicyConfig):
        lines: str | None = Field(
            None,
            description="YAML or JSON file: per layer and query head the verticals and slashes; else the first turn's.",
        )
        alpha: float = Field(0.95, gt=0, le=1, description="Share of the first turn's sampled attention to cover.")
        sample_rows: int = Field(128, gt=0, description="Rows of the first turn whose attention chooses lines.")
        sampling: Sampling = Field(Sampling.MIXED, description="How they are drawn, as in the policy loopserve.")
        seed: int = Field(0, ge=0, description="Seed of the draw.")
        sink_tokens: int = Field(
            4, ge=0, description="First tokens of the conversation that every new token attends to."
        )
        local_window: int = Field(
            64, gt=0, description="Last tokens up to and including itself that every new token attends to."
        )

    config: Config

    def __init__(self, config: PolicyConfig | None = None) -> None:
        super().__init__(config)
        self.given: GivenLines = read_lines(self.config.lines) if self.config.lines else {}

    def refuses(self, layer: LayerSpec) -> str | None:
        if not self.given:
            return None
        return misfit(self.given, layer.index, layer.query_heads, self.config.lines, kind="lines")

    def sparsify(self, inputs: AttentionInputs) -> AttentionPattern:
        total = inputs.total_tokens
        if self.given:
            verticals, slashes = self._as_given(inputs)
        else:
            if inputs.turn == 0 or inputs.layer.index not in inputs.state:
                inputs.state[inputs.layer.index] = self._choose(inputs)
            kept: tuple[Tensor, Tensor] = inputs.state[inputs.layer.index]
            verticals, slashes = (pad(each, (0, total - each.shape[1])) for each in kept)
        near, sinks = self._forced(inputs)
        return LinePattern(verticals | sinks, slashes | near, inputs.new_tokens)

    def _forced(self, inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
        sinks = sink_lines(inputs, self.config.sink_tokens)
        offsets = torch.arange(inputs.total_tokens, device=sinks.device)
        return (offsets < self.config.local_window).expand_as(sinks), sinks

    def _choose(self, inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
        config = self.config
        source = generator(config.seed, inputs.turn, inputs.layer.index, inputs.total_tokens)
        rows = sample_rows(inputs.new_tokens, config.sample_rows, config.sampling, source).to(inputs.queries.device)
        near, sinks = self._forced(inputs)
        chosen = select_lines(
            inputs.row_attention(rows, kind="lines").probabilities,
            inputs.columns[rows],
            inputs.new_tokens,
            alpha=config.alpha,
            cost="tile",
            forced_verticals=sinks,
            forced_slashes=near,
        )
        return chosen.verticals, chosen.slashes

    def _as_given(self, inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
        heads, total = inputs.queries.shape[0], inputs.total_tokens
        cells = torch.zeros(2, heads, total, dtype=torch.bool, device="cpu")
        for head, lines in enumerate(self.given[inputs.layer.index]):
            for kind, numbers in enumerate((lines.verticals, lines.slashes)):
                cells[kind, head, [each for each in numbers if each < total]] = True
        verticals, slashes = cells.to(inputs.device)
        return verticals, slashes
