"""Full cost of choosing, stated density of computing: for models with random weights, whose attention has no structure."""

from __future__ import annotations

import time
from typing import ClassVar, Literal

from loopserve.bench.heads import planted_lines
from loopserve.core.interfaces import AttentionInputs, PrefillSparsifier
from loopserve.core.patterns import AttentionPattern, DensePattern, LinePattern


class PlantedSparsifier(PrefillSparsifier):
    """Lets another sparsifier score and select, then computes planted lines of a stated density instead of its choice.

    Where the other one falls back to dense before it has chosen anything, so does this one. Patterns are drawn once per
    shape. ``choosing_s``: seconds that the other one took since it was last set to 0.
    """

    name: ClassVar[str] = "planted"
    paper: ClassVar[str] = ""

    def __init__(self, chooser: PrefillSparsifier, density: float, of: Literal["cells", "tiles"] = "cells") -> None:
        super().__init__()
        self.chooser, self.density, self.of = chooser, density, of
        self.choosing_s = 0.0
        self._patterns: dict[tuple[int, int, int, str], LinePattern] = {}

    def sparsify(self, inputs: AttentionInputs) -> AttentionPattern:
        started = time.perf_counter()
        chosen = self.chooser.sparsify(inputs)
        self.choosing_s += time.perf_counter() - started
        return chosen if isinstance(chosen, DensePattern) else self.planted(inputs)

    def planted(self, inputs: AttentionInputs) -> LinePattern:
        """The pattern for such a call."""
        key = (inputs.queries.shape[0], inputs.new_tokens, inputs.total_tokens, str(inputs.keys.device))
        if key not in self._patterns:
            heads, new, total, device = key
            self._patterns[key] = planted_lines(heads, new, total, self.density, of=self.of, device=device)
        return self._patterns[key]
