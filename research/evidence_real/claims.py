"""The paper's claims about attention itself: it is concentrated on few lines, and which lines they are the input decides."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from loopserve.bench.heads import Heads
from loopserve.core.policy.patterns import LinePattern
from loopserve.kernels.select_lines import select_lines
from research.evidence.lines import jaccard, row_coverage, softmax_rows
from research.evidence_real.case import loaded
from research.evidence_real.replay import Recording, TurnRecorder
from research.evidence_real.texts import continued, text

ALPHAS = (0.90, 0.95)


def recorded(model: str, kind: str, number: int, tokens: int) -> Recording:
    """Return what the layers compute of a text, read at once."""
    network, tokenizer = loaded(model)
    recorder = TurnRecorder(network)
    recorder.read(continued(tokenizer, text(kind, number), tokens, 0)[0])
    return recorder.recording()


class _Side:
    """Hold one head's attention over a text, and the lines that all its rows choose at the price of their length."""

    def __init__(self, recording: Recording, layer: int, head: int) -> None:
        queries, call = recording.queries[layer]
        keys, values = recording.pairs[layer]
        owner = head // (queries.shape[0] // keys.shape[0])
        heads = Heads(queries[head : head + 1], keys[owner : owner + 1], values[owner : owner + 1], "recorded")
        assert call.softcap is None
        self.probabilities, self.columns = softmax_rows(heads)
        self.new = self.probabilities.shape[1]

    def lines(self, alpha: float) -> LinePattern:
        chosen = select_lines(self.probabilities, self.columns, self.new, alpha=alpha, cost="length")
        return LinePattern(chosen.verticals, chosen.slashes, self.new)


def measure(model: str, kind: str, tokens: int, *, pairs: bool) -> dict[str, Any]:
    """Return by layer and head the lines and cells that hold a share of a text's attention.

    pairs: also what the lines of another text of the kind have in common with this one's, and hold of its attention.
    """
    one = recorded(model, kind, 0, tokens)
    other = recorded(model, kind, 1, tokens) if pairs else None
    found: dict[str, Any] = {f"{name}_{alpha:g}": [] for alpha in ALPHAS for name in ("lines", "cells")}
    found |= {name: [] for name in ("overlap", "held", "own") if pairs}
    with torch.no_grad():
        for layer in sorted(one.queries):
            values: dict[str, list[float]] = {name: [] for name in found}
            for head in range(one.queries[layer][0].shape[0]):
                for name, value in _of_head(one, other, layer, head).items():
                    values[name].append(round(value, 4))
            for name, each in values.items():
                found[name].append(each)
    return found


def _of_head(one: Recording, other: Recording | None, layer: int, head: int) -> dict[str, float]:
    mine = _Side(one, layer, head)
    found = {}
    for alpha in ALPHAS:
        pattern = mine.lines(alpha)
        count = int(pattern.verticals.sum() + pattern.slashes.sum())
        found[f"lines_{alpha:g}"] = count / (2 * pattern.verticals.shape[1])
        found[f"cells_{alpha:g}"] = float(pattern.cell_density())
        if alpha == ALPHAS[0]:
            first = pattern
    if other is not None:
        theirs = _Side(other, layer, head).lines(ALPHAS[0])
        total = first.verticals.shape[1]
        lent = LinePattern(_fit(theirs.verticals, total), _fit(theirs.slashes, total), mine.new)
        both = [torch.cat([each.verticals, each.slashes], dim=1) for each in (first, lent)]
        found["overlap"] = float(jaccard(*both))
        found["held"] = float(row_coverage(lent, mine.probabilities, mine.columns).mean())
        found["own"] = float(row_coverage(first, mine.probabilities, mine.columns).mean())
    return found


def _fit(lines: Tensor, total: int) -> Tensor:
    return pad(lines[:, :total], (0, max(0, total - lines.shape[1])))
