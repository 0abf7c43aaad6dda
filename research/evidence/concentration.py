"""Claim 1: a tenth of the vertical and slash lines holds nine tenths of the attention."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean
from typing import Any

from loopserve.bench.heads import Heads
from loopserve.bench.recall import HELD_OUT_SEED, RecallTask
from loopserve.core.policy.patterns import LinePattern
from loopserve.kernels.select_lines import select_lines
from research.evidence.lines import fewest_lines, softmax_rows
from research.evidence.pictures import Pictures, dressed, lines
from research.evidence.recording import record
from research.evidence.tally import with_error
from research.evidence.units import Found, Row, Spec, Unit
from research.evidence.words import percent, table, verdict

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


def section(rows: Sequence[Row], pictures: Pictures) -> str:
    lengths = sorted({row["unit"]["task"]["tokens"] for row in rows})
    by_length = {
        tokens: [row["found"] for row in rows if row["unit"]["task"]["tokens"] == tokens] for tokens in lengths
    }
    return "\n\n".join(
        [
            "Lines are vertical and slash lines, 2n of them for n tokens. *Fewest*: taken one by one, heaviest first, "
            "cells of two lines counted once; an "
            "upper bound for the smallest share. *By length*: as the policy chooses at the price of a line's length, "
            "and the cells that these "
            "lines compute. All rows choose. Means over layers, heads and dialogues.",
            table(
                [
                    "tokens",
                    "dialogues",
                    "block",
                    *(f"{kind}, {percent(alpha, 0)}" for alpha in ALPHAS for kind in ("fewest", "by length", "cells")),
                ],
                [_row(tokens, found, block) for block in ("whole", "turn") for tokens, found in by_length.items()],
            ),
            f"Fewest lines per layer and head at {lengths[-1]:,} tokens, as shares of all lines for 90 % / 95 % of the "
            "mass, the dialogue read at once:",
            _by_head(by_length[lengths[-1]]),
            _picture(by_length, pictures),
            *_verdicts(by_length),
        ]
    )


def _values(found: Sequence[Found], block: str, alpha: float, name: str) -> list[float]:
    """A figure, mean over layers and heads: one value per dialogue."""
    return [mean(value for layer in each[block][str(alpha)][name] for value in layer) for each in found]


def _row(tokens: int, found: Sequence[Found], block: str) -> list[str]:
    figures = [
        with_error(_values(found, block, alpha, name)) for alpha in ALPHAS for name in ("fewest", "by_length", "cells")
    ]
    said = {"whole": "whole dialogue", "turn": "last turn over its history"}[block]
    return [f"{tokens:,}", str(len(found)), said, *figures]


def _heads(found: Sequence[Found], alpha: float) -> list[list[float]]:
    """Fewest lines ``[layers][heads]``, mean over dialogues."""
    maps = [each["whole"][str(alpha)]["fewest"] for each in found]
    return [[mean(values) for values in zip(*layers, strict=True)] for layers in zip(*maps, strict=True)]


def _by_head(found: Sequence[Found]) -> str:
    nine, more = (_heads(found, alpha) for alpha in ALPHAS)
    header = ["layer", *(f"head {head}" for head in range(len(nine[0])))]
    rows = [
        [str(layer), *(f"{percent(a)} / {percent(b)}" for a, b in zip(*heads, strict=True))]
        for layer, heads in enumerate(zip(nine, more, strict=True))
    ]
    return table(header, rows)


def _picture(by_length: dict[int, list[Found]], pictures: Pictures) -> str:
    figure = pictures.figure(10, 3.6)
    for axes, alpha in zip(figure.subplots(1, 2, sharey=True), ALPHAS, strict=True):
        maps = {tokens: _heads(found, alpha) for tokens, found in by_length.items()}
        layers = len(next(iter(maps.values())))
        lines(
            axes,
            {
                f"layer {layer}": [(tokens, 100 * mean(heads[layer])) for tokens, heads in maps.items()]
                for layer in range(layers)
            },
        )
        dressed(axes, f"{percent(alpha, 0)} of the mass", "tokens", "fewest lines, % of all", xscale="log")
        axes.set_xticks(list(maps), [f"{tokens:,}" for tokens in maps])
        axes.minorticks_off()
    return pictures.save(
        figure, "concentration", "Share of lines that holds 90 and 95 % of the mass, by length and layer"
    )


def _verdicts(by_length: dict[int, list[Found]]) -> list[str]:
    longest, shortest = max(by_length), min(by_length)
    alpha = ALPHAS[0]
    share = mean(_values(by_length[longest], "whole", alpha, "fewest"))
    heads = [value for layer in _heads(by_length[longest], alpha) for value in layer]
    before = mean(_values(by_length[shortest], "whole", alpha, "fewest"))
    return [
        verdict(
            share <= 0.10,
            f"at {longest:,} tokens {percent(share)} of the lines hold {percent(alpha, 0)} of the attention on "
            f"average, and between {percent(min(heads))} and "
            f"{percent(max(heads))} in single heads; {sum(value <= 0.10 for value in heads)} of {len(heads)} heads "
            "need a tenth or less.",
        ),
        f"The share {'falls' if share < before else 'does not fall'} with length: {percent(before)} at {shortest:,} "
        f"tokens, {percent(share)} at {longest:,}.",
    ]
