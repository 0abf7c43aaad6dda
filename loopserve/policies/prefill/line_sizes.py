"""Read the numbers of lines per head that ``minference`` uses, and search for the best numbers for a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveInt
from torch import Tensor

from loopserve.core.errors import ConfigError
from loopserve.core.policy.base import PolicyConfig
from loopserve.core.policy.interfaces import AttentionInputs, PrefillSparsifier
from loopserve.core.policy.patterns import DensePattern, LinePattern
from loopserve.kernels.line_scores import LineScores
from loopserve.policies.head_files import read_head_file, write_head_file
from loopserve.policies.lines import heaviest, sink_lines

LineSizes = Mapping[int, Sequence[tuple[int, int]]]
# (vertical, slash) sizes compared, from mostly vertical to mostly slash: the authors' search space, in shares of its largest.
CANDIDATES = ((1000, 4000), (1500, 2500), (2500, 1000), (3500, 100), (500, 5000), (100, 6000), (30, 800), (100, 750))


class _SizesFile(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str | None = Field(None, description="What the sizes were searched on.")
    layers: dict[int, list[tuple[PositiveInt, PositiveInt]]] = Field(
        description="Per layer, per query head: [vertical size, slash size]."
    )


def read_sizes(path: str) -> LineSizes:
    """Return sizes per head by layer. Raises ConfigError, with the place, for a file that has another form."""
    return read_head_file(path, _SizesFile, "a sizes file says layers: {0: [[1000, 6096], ...]}").layers


def write_sizes(path: str, sizes: LineSizes, model: str) -> None:
    """Write sizes per head by layer. Raises ConfigError if the file cannot be written."""
    write_head_file(path, sizes, model)


class SizeSearch(PrefillSparsifier):
    """Compute every cell, and find the sizes that would have held most of each head's attention.

    Paper: https://arxiv.org/abs/2407.02490. Per head, candidates of equal cost are compared: ``share`` of the causal cells in
    different mixtures of vertical and slash lines. Lines are chosen by the last rows, and their coverage is measured on other rows.
    The results are kept in the object, so each search needs a new object. It is not registered.

    Multi-turn: every prefill call has the same weight.
    """

    name: ClassVar[str] = "size_search"
    paper: ClassVar[str] = "https://arxiv.org/abs/2407.02490"

    class Config(PolicyConfig):
        share: float = Field(0.2, gt=0, le=1, description="Share of the causal cells that a head may compute.")
        last_rows: int = Field(64, gt=0, description="Rows that choose lines.")
        judged_rows: int = Field(128, gt=0, description="Rows, spread over the block, that judge them.")
        sink_tokens: int = Field(30, ge=0, description="Columns always among the verticals.")
        local_window: int = Field(100, gt=0, description="Offsets always among the slashes.")

    config: Config

    def __init__(self, config: PolicyConfig | None = None) -> None:
        super().__init__(config)
        self._covered: dict[int, Tensor] = {}  # [candidates, Hq], summed over calls
        self._sizes: dict[int, list[tuple[int, int]]] = {}

    def sparsify(self, inputs: AttentionInputs) -> DensePattern:
        candidates = scaled(inputs.new_tokens, inputs.total_tokens, self.config.share)
        self._sizes[inputs.layer.index] = candidates
        covered = torch.stack([self._coverage(inputs, *each) for each in candidates])
        held = self._covered.get(inputs.layer.index)
        self._covered[inputs.layer.index] = covered if held is None else held + covered
        return DensePattern(inputs.queries.shape[0], inputs.new_tokens, inputs.total_tokens)

    def _coverage(self, inputs: AttentionInputs, vertical: int, slash: int) -> Tensor:
        heads, device = inputs.queries.shape[0], inputs.keys.device
        mass = self._rows(inputs, max(inputs.new_tokens - self.config.last_rows, 0), inputs.new_tokens)
        near = (torch.arange(inputs.total_tokens, device=device) < self.config.local_window).expand(heads, -1)
        pattern = LinePattern(
            heaviest(
                mass.vertical,
                torch.full((heads,), vertical, dtype=torch.long, device=device),
                sink_lines(inputs, self.config.sink_tokens),
            ),
            heaviest(mass.slash, torch.full((heads,), slash, dtype=torch.long, device=device), near),
            inputs.new_tokens,
        )
        step = max(1, inputs.new_tokens // self.config.judged_rows)
        judged = torch.arange(0, inputs.new_tokens, step, device=device)
        return pattern.coverage(inputs.row_attention(judged).probabilities, inputs.columns[judged]).cpu()

    def _rows(self, inputs: AttentionInputs, first: int, end: int) -> LineScores:
        return inputs.row_attention(torch.arange(first, end, device=inputs.keys.device))

    def found(self) -> dict[int, list[tuple[int, int]]]:
        """Return the best sizes of each head by layer, for the length searched last. Raises ConfigError if nothing was computed."""
        if not self._covered:
            raise ConfigError("the search saw no full-attention layer")
        best = {layer: covered.argmax(0).tolist() for layer, covered in self._covered.items()}
        return {layer: [self._sizes[layer][index] for index in heads] for layer, heads in sorted(best.items())}


def scaled(new: int, total: int, share: float) -> list[tuple[int, int]]:
    """Return the candidates' mixtures, each scaled so that its lines have about ``share`` of a block's causal cells."""
    cells = share * (new * (total - new) + new * (new + 1) / 2)
    sizes = []
    for vertical, slash in CANDIDATES:
        lines = cells / new  # every line is at most as long as the block
        part = vertical / (vertical + slash)
        sizes.append((max(1, min(total, round(lines * part))), max(1, min(total, round(lines * (1 - part))))))
    return list(dict.fromkeys(sizes))


def describe(sizes: LineSizes) -> dict[str, Any]:
    """Return how often each pair of sizes was found."""
    counts: dict[str, int] = {}
    for heads in sizes.values():
        for vertical, slash in heads:
            key = f"{vertical} vertical, {slash} slash"
            counts[key] = counts.get(key, 0) + 1
    return dict(sorted(counts.items(), key=lambda each: -each[1]))
