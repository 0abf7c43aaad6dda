"""A picture of one head's attention in a turn, with the lines that hold a share alpha of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import max_pool2d

from loopserve.api import load_stack
from loopserve.bench.recall import HELD_OUT_SEED, RecallTask
from loopserve.core.policy.patterns import LinePattern
from research.evidence.coverage import call_of
from research.evidence.lines import softmax_rows
from research.evidence.pictures import Pictures
from research.evidence.recipes import FULL, lines_by_alpha
from research.evidence.recording import record
from research.evidence.units import Found, Row, Spec, Unit
from research.evidence.words import percent

NAME = "attention_map"
_LEVELS = 9
_LOWEST = -4.0  # decimal logarithm of the weight that is drawn as nothing
_FINENESS = 8  # rows and columns that one dot stands for, by their largest weight


def units(tokens: int, model: str = "demo") -> list[Unit]:
    task = {"tokens": tokens, "turns": 3, "keys": 2, "position": "middle"}
    return [Unit(NAME, {"kind": NAME, "label": "one head", "model": model, "task": task, "seed": 700})]


def measure(spec: Spec) -> Found:
    """The head whose lines are most of both kinds, in the last turn: its ``map`` (a digit per dot, 0 to 9 by the logarithm of
    the largest weight), its lines, and what they hold.
    """
    recording = record(spec["model"], RecallTask(**spec["task"]), HELD_OUT_SEED + spec["seed"])
    sparsifier = load_stack({"prefill": lines_by_alpha(), "decode": FULL}).prefill
    turn = recording.turns - 1
    best: tuple[int, int, int, LinePattern] | None = None
    for layer in recording.layers:
        pattern = sparsifier.sparsify(call_of(recording, layer, turn))
        if not isinstance(pattern, LinePattern) or pattern.dense_heads is None:
            continue
        both = pattern.verticals.sum(1).minimum(pattern.slashes.sum(1) - 64).masked_fill(pattern.dense_heads, -1)
        head = int(both.argmax())
        if best is None or int(both[head]) > best[0]:
            best = (int(both[head]), layer, head, pattern)
    assert best is not None, "no lines were chosen in any layer"
    _, layer, head, pattern = best
    probabilities, columns = softmax_rows(recording.block(layer, *recording.rows_of(turn)), head)
    inside = (probabilities[0] * pattern.rows(columns)[head]).sum() / len(columns)
    return {
        "layer": layer,
        "head": head,
        "rows": len(columns),
        "columns": probabilities.shape[2],
        "map": digits(probabilities[0]),
        "verticals": pattern.verticals[head].nonzero().flatten().tolist(),
        "slashes": pattern.slashes[head].nonzero().flatten().tolist(),
        "cells": round(float(pattern.cell_density()[head]), 4),
        "held": round(float(inside), 4),
    }


def digits(weights: Tensor) -> list[str]:
    """A map ``[m, n]`` of weights as lines of digits, one per dot of ``_FINENESS`` cells each way, the last ones cut off."""
    dots = max_pool2d(weights[None, None], _FINENESS)[0, 0]
    levels = (dots.clamp(min=1e-12).log10() - _LOWEST) / -_LOWEST * _LEVELS
    return ["".join(map(str, row)) for row in levels.round().clamp(0, _LEVELS).int().tolist()]


def section(rows: Sequence[Row], pictures: Pictures) -> str:
    if not rows:
        return ""
    found = rows[0]["found"]
    levels = torch.tensor([[int(digit) for digit in line] for line in found["map"]], dtype=torch.long, device="cpu")
    figure = pictures.figure(11, 5.4)
    above, below = figure.subplots(2, 1, sharex=True)
    first = found["columns"] - found["rows"]
    extent = (0, found["columns"], found["rows"], 0)
    for axes in (above, below):
        axes.imshow(levels.numpy(), cmap="magma", aspect="auto", extent=extent, interpolation="nearest")
        axes.set(ylabel="row of the turn", xlim=(0, found["columns"]), ylim=(found["rows"], 0))
    for column in found["verticals"]:
        below.plot([column, column], [max(0, column - first), found["rows"]], color="#5ad1ff", linewidth=0.4, alpha=0.7)
    for offset in found["slashes"]:
        start = max(0, offset - first)
        below.plot(
            [first + start - offset, first + found["rows"] - offset],
            [start, found["rows"]],
            color="#b6f27c",
            linewidth=0.4,
            alpha=0.5,
        )
    above.set_title(f"attention of layer {found['layer']}, head {found['head']} in the last turn", fontsize=10)
    below.set_title("the same with the lines chosen: verticals blue, slashes green", fontsize=10)
    below.set_xlabel("column of the conversation")
    return "\n\n".join(
        [
            f"One head of layer {found['layer']}: {len(found['verticals'])} vertical and {len(found['slashes'])} slash "
            "lines, "
            f"{percent(found['cells'])} of the cells, hold {percent(found['held'])} of its attention in this turn.",
            pictures.save(figure, "attention_map", "Attention map of one head, without and with the chosen lines"),
        ]
    )
