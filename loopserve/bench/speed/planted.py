"""Replace a sparsifier's selection by planted lines of a given density, at the full cost of scoring and selection.

It serves models with random weights, whose attention has no structure.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import ClassVar, Literal

import torch

from loopserve.bench.heads import Heads, planted_lines, structured_heads
from loopserve.core.policy.interfaces import AttentionInputs, PrefillSparsifier
from loopserve.core.policy.patterns import AttentionPattern, DensePattern, LinePattern


class PlantedSparsifier(PrefillSparsifier):
    """Score and select with another sparsifier, then compute planted lines of a given density instead of its choice.

    Where the other one falls back to dense before its selection, this one does too. Patterns are drawn once per shape.
    ``choosing_s``: seconds of the other one. ``drawing_s``: seconds of drawing the lines, which no real stack spends.
    Both count since they were last set to 0.
    """

    name: ClassVar[str] = "planted"
    paper: ClassVar[str] = ""

    def __init__(
        self,
        chooser: PrefillSparsifier,
        density: float,
        of: Literal["cells", "tiles"] = "cells",
        *,
        structured: bool = False,
    ) -> None:
        """Wrap a sparsifier. structured: it selects on synthetic heads of the call's shape (``bench.heads``).

        Without structured heads it selects on flat attention, where a share of the mass needs as large a share of the
        lines.
        """
        super().__init__()
        self.structured = structured
        self._heads: dict[tuple[int, ...], Heads] = {}
        self.chooser, self.density, self.of = chooser, density, of
        self.choosing_s = self.drawing_s = 0.0
        self._patterns: dict[tuple[int, int, int, str], LinePattern] = {}

    def sparsify(self, inputs: AttentionInputs) -> AttentionPattern:
        started = _now(inputs)
        inputs = self._structured(inputs) if self.structured else inputs
        pattern = self.planted(inputs)
        drawn = _now(inputs)
        chosen = self.chooser.sparsify(inputs)
        self.drawing_s += drawn - started
        self.choosing_s += _now(inputs) - drawn
        return chosen if isinstance(chosen, DensePattern) else pattern

    def _structured(self, inputs: AttentionInputs) -> AttentionInputs:
        shape = (len(inputs.queries), len(inputs.keys), inputs.new_tokens, inputs.total_tokens, inputs.keys.shape[2])
        if shape not in self._heads:
            made = structured_heads(*shape, device=str(inputs.keys.device))
            self._heads = {shape: made.to(inputs.keys.dtype)}  # of one length at a time
        heads = self._heads[shape]
        return replace(inputs, queries=heads.queries, keys=heads.keys, scaling=heads.scaling, softcap=None, scratch={})

    def planted(self, inputs: AttentionInputs) -> LinePattern:
        """Return the pattern for such a call."""
        key = (inputs.queries.shape[0], inputs.new_tokens, inputs.total_tokens, str(inputs.keys.device))
        if key not in self._patterns:
            heads, new, total, device = key
            self._patterns[key] = planted_lines(heads, new, total, self.density, of=self.of, device=device)
        return self._patterns[key]


def _now(inputs: AttentionInputs) -> float:
    """Return seconds on the clock, after the device has finished its queue."""
    if inputs.keys.device.type == "cuda":
        torch.cuda.synchronize(inputs.keys.device)
    return time.perf_counter()
