"""Implement LoopServe, phase one: online prefill sparsification."""

from __future__ import annotations

import math
from enum import StrEnum
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from loopserve.core.policy.base import PolicyConfig
from loopserve.core.policy.interfaces import AttentionInputs, PrefillSparsifier
from loopserve.core.policy.patterns import AttentionPattern, DensePattern, LinePattern
from loopserve.kernels.select_lines import MOST_TILE, select_lines
from loopserve.policies.draws import SAMPLED_ROWS, Sampling, generator, sample_rows, uniform_rows
from loopserve.policies.lines import lines_counted_apart, sink_lines

_HELD_OUT = 1  # second draw of a call, independent of the first


class RowWeights(StrEnum):
    """Name the weight of a sampled row in the coverage target."""

    EQUAL = "equal"
    FAR = "far"  # by the share of its mass beyond sinks and local window: rows that attend to distant tokens need the history


class LoopServePrefill(PrefillSparsifier):
    """Compute, per query head, the vertical and slash lines that hold a share ``alpha`` of the new turn's attention (LoopServe).

    Paper: https://arxiv.org/abs/2507.13681. For a block of m new queries over n keys: the softmax of a few sampled rows gives the
    mass of each of the 2n lines; lines are taken greedily by gain per cost, per head, until they hold ``alpha`` of the sample's
    mass. Cells that two lines share count once.

    Variant and deviations: the paper's code is not public, so the greedy order, the cost and the sampling are an interpretation.
    The diagonal is always computed (each query needs a key). Additions, all of them options: one least weight per computed cell
    that ends the choice of every head and layer (``least_weight``; cells then go where they hold most mass, and a flat head ends
    below alpha), sampling variants, row weights and a minimum per row (a mean over rows can miss the few rows that matter), cost
    in tiles, sinks, local window, dense fallback per head. Attention is renormalised over the computed cells. A chunked prefill
    chooses lines chunk by chunk.

    Multi-turn: lines are chosen again for each turn, from that turn's own rows over the whole stored history and the new turn.
    Nothing is stored or evicted, so the next turn can attend to any pair. After an eviction by a decode policy, lines are those of
    the survivors' columns.
    """

    name: ClassVar[str] = "loopserve"
    paper: ClassVar[str] = "https://arxiv.org/abs/2507.13681"

    class Config(PolicyConfig):
        alpha: float = Field(0.95, gt=0, le=1, description="Share of the attention mass to cover, per head; 1 = dense.")
        least_weight: float | None = Field(
            None,
            gt=0,
            lt=1,
            description="Mean weight per computed cell, over the sampled rows, below which no further line is taken; the same "
            "for all heads and layers. Heads may then end below alpha. None: every head reaches alpha.",
        )
        sample_rows: int = Field(
            128, gt=0, description="Rows of the new turn whose attention is computed to choose lines."
        )
        sample_share: float = Field(
            1.0, gt=0, le=1, description="Most rows that are sampled, as a share of the new turn; at least one row is."
        )
        sampling: Sampling = Field(
            Sampling.MIXED,
            description="uniform; stratified: one per equal segment; last: last rows; mixed: half last, half uniform.",
        )
        seed: int = Field(
            0, ge=0, description="Seed of the draw; rows depend on it, the turn, the layer and the length."
        )
        row_weights: RowWeights = Field(
            RowWeights.EQUAL,
            description="equal, or far: a row counts by its mass beyond sinks and local window, mean over heads.",
        )
        last_rows_weight: float = Field(
            1.0, gt=0, description="What a sampled row among the last sample_rows / 2 rows counts, others counting 1."
        )
        row_floor: float | None = Field(
            None,
            gt=0,
            le=1,
            description="Share of its own mass that each sampled row must keep as well; none by default.",
        )
        cost: Literal["length", "tile"] = Field(
            "tile", description="What a line costs: its cells, or what a kernel computing in tiles adds for it."
        )
        overlap: bool = Field(
            True,
            description="Count cells that two lines share once; false is an ablation (lines by mass per length, rows alike).",
        )
        tile_rows: int = Field(
            64,
            gt=0,
            le=MOST_TILE,
            description="Rows of a tile, for cost: tile: what an isolated slash costs, in verticals. 64 fits the GPU kernels; the "
            "compiled CPU kernels compute a lonely slash cell by cell, at the price of about 4.",
        )
        sink_tokens: int = Field(4, ge=0, description="First stored tokens that every new token attends to.")
        local_window: int = Field(
            64,
            gt=0,
            description="Last tokens up to and including itself that every new token attends to; 1 = the diagonal.",
        )
        min_new_tokens: int = Field(128, ge=0, description="Shorter turns are computed dense.")
        min_total_tokens: int = Field(256, ge=0, description="Shorter conversations are computed dense.")
        dense_above: float = Field(0.75, gt=0, le=1, description="Tile density above which a head is computed dense.")
        held_out_rows: int = Field(
            0, ge=0, description="Rows, not used to choose, on which coverage is measured; 0 = not measured."
        )

        @model_validator(mode="after")
        def _fits(self) -> LoopServePrefill.Config:
            if self.least_weight is not None and not self.overlap:
                raise ValueError("least_weight needs overlap: true; lines counted apart are taken up to alpha")
            return self

    config: Config

    def sparsify(self, inputs: AttentionInputs) -> AttentionPattern:
        """Return the lines of each head, or all cells where sparse attention is not cheaper. Each such fallback is counted."""
        reason = self._dense_reason(inputs)
        if reason is not None:
            inputs.record.count(f"fallback:{reason}")
            inputs.record.mean(
                "coverage_estimated", torch.ones(inputs.queries.shape[0], dtype=torch.float32, device="cpu")
            )
            return DensePattern(inputs.queries.shape[0], inputs.new_tokens, inputs.total_tokens)
        rows = self._rows(inputs)
        inputs.scratch[SAMPLED_ROWS] = rows
        pattern, coverage = self._choose(inputs, rows)
        inputs.record.mean("coverage_estimated", coverage)
        if self.config.held_out_rows:
            self._measure_held_out(inputs, pattern, rows)
        return pattern

    def _dense_reason(self, inputs: AttentionInputs) -> str | None:
        if self.config.alpha >= 1:
            return "alpha_is_one"
        if inputs.new_tokens < max(self.config.min_new_tokens, 1):
            return "short_turn"
        if inputs.total_tokens < self.config.min_total_tokens:
            return "short_conversation"
        return None

    def _rows(self, inputs: AttentionInputs) -> Tensor:
        """Return the rows of this call whose attention is computed, the same for all heads: sorted int64 ``[r]``."""
        source = generator(self.config.seed, inputs.turn, inputs.layer.index, inputs.total_tokens)
        rows = sample_rows(inputs.new_tokens, self._count(inputs), self.config.sampling, source)
        return rows.to(inputs.queries.device)

    def _count(self, inputs: AttentionInputs) -> int:
        """Return how many rows are sampled at most."""
        return min(self.config.sample_rows, max(1, int(inputs.new_tokens * self.config.sample_share)))

    def _choose(self, inputs: AttentionInputs, rows: Tensor) -> tuple[LinePattern, Tensor]:
        """Return the pattern, and the coverage of the sample per head ``[Hq]``."""
        config = self.config
        verticals = sink_lines(inputs, config.sink_tokens)
        offsets = torch.arange(inputs.total_tokens, device=inputs.device)
        slashes = (offsets < config.local_window).expand_as(verticals)
        if not config.overlap:
            mass = inputs.row_attention(rows, kind="lines")
            lines = lines_counted_apart(
                mass.vertical, mass.slash, inputs.new_tokens, config.alpha, (verticals, slashes)
            )
            apart = LinePattern(*lines, inputs.new_tokens)
            return apart, apart.coverage(mass.probabilities, inputs.columns[rows])
        options: dict[str, Any] = {
            "alpha": config.alpha,
            "cost": config.cost,
            "tile": config.tile_rows,
            "row_floor": config.row_floor,
            "forced_verticals": verticals,
            "forced_slashes": slashes,
            "most_cost": self._most_cost(inputs),
            "least_weight": config.least_weight or 0.0,
        }
        if config.row_weights is RowWeights.FAR:  # weights that depend on the rows' attention
            probabilities = inputs.row_attention(rows, kind="lines").probabilities
            weights = self._weights(inputs, rows, probabilities)
            selection = select_lines(
                probabilities, inputs.columns[rows], inputs.new_tokens, row_weights=weights, **options
            )
        else:
            selection = inputs.choose_lines(rows, row_weights=self._weights(inputs, rows, None), **options)
        verticals, slashes, coverage, row_coverage, _ = selection
        inputs.record.mean("lines", (verticals.sum(-1) + slashes.sum(-1)).float())
        pattern = LinePattern(verticals, slashes, inputs.new_tokens)
        too_dense = pattern.tile_density() > config.dense_above
        if config.least_weight is None:
            # A head whose lines would have cost too much was not completed and did not reach its target.
            too_dense |= (coverage < config.alpha - 1e-4) | (row_coverage < (config.row_floor or 0.0) - 1e-4).any(1)
        if bool(too_dense.any()):
            inputs.record.count("fallback:dense_head", float(too_dense.sum()))
            pattern = LinePattern(verticals, slashes, inputs.new_tokens, dense_heads=too_dense)
            coverage = coverage.masked_fill(too_dense, 1.0)
        return pattern, coverage

    def _most_cost(self, inputs: AttentionInputs) -> float:
        """Return the most that the lines of a head may cost before dense attention is cheaper, with a margin for lines that
        overlap. Under ``least_weight`` there is no limit, since what a head costs follows from where its mass lies.
        """
        if self.config.dense_above >= 1 or self.config.least_weight is not None:
            return math.inf
        new, total = inputs.new_tokens, inputs.total_tokens
        per_row = total - new + (new + 1) / 2  # keys that a row sees, on average
        return 1.1 * self.config.dense_above * (per_row if self.config.cost == "tile" else per_row * new)

    def _weights(self, inputs: AttentionInputs, rows: Tensor, probabilities: Tensor | None) -> Tensor | None:
        """Return the weight of each sampled row ``[r]``, or None when all are equal. probabilities: needed for ``row_weights:
        far``.
        """
        config = self.config
        if config.row_weights is RowWeights.EQUAL and config.last_rows_weight == 1.0:
            return None
        weights = torch.ones(len(rows), dtype=torch.float32, device=rows.device)
        if probabilities is not None:
            offsets = inputs.columns[rows][:, None] - torch.arange(inputs.total_tokens, device=rows.device)
            beyond = (offsets >= config.local_window) & ~sink_lines(inputs, config.sink_tokens)[:, None]
            # Every row keeps a small weight, so that the target is defined in a turn without distant attention.
            weights = (probabilities * beyond).sum(-1).mean(0) + 1e-3
        last = rows >= inputs.new_tokens - self._count(inputs) // 2
        return torch.where(last, weights * config.last_rows_weight, weights)

    def _measure_held_out(self, inputs: AttentionInputs, pattern: LinePattern, rows: Tensor) -> None:
        """Measure coverage on rows other than those that chose the lines, where it would be biased upwards."""
        unused = torch.ones(inputs.new_tokens, dtype=torch.bool, device="cpu")
        unused[rows.cpu()] = False
        source = generator(self.config.seed, inputs.turn, inputs.layer.index, inputs.total_tokens, _HELD_OUT)
        held_out = uniform_rows(unused.nonzero().flatten(), self.config.held_out_rows, source)
        if len(held_out):
            inputs.record.mean("coverage_held_out", inputs.coverage(pattern, held_out.to(rows.device)))
