"""Claim 1: a tenth of the vertical and slash lines holds nine tenths of the attention."""

from __future__ import annotations

from typing import Any

import torch

from loopserve.bench.evidence.lines import fewest_lines, softmax_rows
from loopserve.bench.evidence.recording import record
from loopserve.bench.evidence.units import Found, Spec, Unit
from loopserve.bench.heads import Heads
from loopserve.bench.recall import HELD_OUT_SEED, RecallTask
from loopserve.core.patterns import LinePattern
from loopserve.kernels.select_lines import select_lines

NAME = "concentration"
ALPHAS = (0.90, 0.95)


def units(lengths: dict[int, int], model: str = "demo") -> list[Unit]:
    """One dialogue a unit; lengths: how many dialogues by their length in tokens."""
    return [
        Unit(
            NAME,
            {
                "kind": NAME,
                "label": f"{tokens} tokens",
                "model": model,
                "task": {"tokens": tokens, "turns": 3, "keys": 2, "position": "mixed"},
                "seed": seed,
            },
        )
        for tokens, count in lengths.items()
        for seed in range(count)
    ]


def measure(spec: Spec) -> Found:
    """Lines needed in each head, for the whole dialogue read at once (``whole``) and for its last turn over what came before
    (``turn``). By share of the mass: ``fewest`` and ``by_length`` (as ``select_lines`` chooses at the price of a line's length),
    both as shares of the 2n lines, and ``cells``, the latter's share of the causal cells; each ``[layers][heads]``.
    """
    recording = record(spec["model"], RecallTask(**spec["task"]), HELD_OUT_SEED + spec["seed"])
    start, stop = recording.rows_of(recording.turns - 1)
    found: Found = {"tokens": recording.length}
    for block, first in (("whole", 0), ("turn", start)):
        found[block] = {str(alpha): {"fewest": [], "by_length": [], "cells": []} for alpha in ALPHAS}
        for layer in recording.layers:
            heads = recording.block(layer, first, stop)
            of_heads = [_of_head(heads, head) for head in range(heads.queries.shape[0])]
            for alpha in ALPHAS:
                for name, values in found[block][str(alpha)].items():
                    values.append([each[alpha][name] for each in of_heads])
    return found


def _of_head(heads: Heads, head: int) -> dict[float, dict[str, float]]:
    probabilities, columns = softmax_rows(heads, head)
    new, total = probabilities.shape[1:]
    shares: dict[float, dict[str, Any]] = {}
    for alpha, fewest in zip(ALPHAS, fewest_lines(probabilities[0], ALPHAS), strict=True):
        chosen = select_lines(probabilities, columns, new, alpha=alpha, cost="length")
        lines = int(chosen.verticals.sum() + chosen.slashes.sum())
        cells = LinePattern(chosen.verticals, chosen.slashes, new).cell_density()
        shares[alpha] = {
            "fewest": round(int(fewest.sum()) / (2 * total), 5),
            "by_length": round(lines / (2 * total), 5),
            "cells": round(float(cells), 5),
        }
    return shares


def shares(found: Found, block: str, alpha: float, name: str) -> torch.Tensor:
    """A stored figure of all layers and heads, ``[layers, heads]``."""
    return torch.tensor(found[block][str(alpha)][name])
