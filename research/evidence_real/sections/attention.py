"""The paper's claims about attention: concentration and input dependence, by layer and head."""

from __future__ import annotations

from collections.abc import Sequence

from research.evidence.units import Row
from research.evidence.words import percent, table
from research.evidence_real.sections.rows import Rows, lengths
from research.evidence_real.sections.verdict import Verdict
from research.evidence_real.texts import KINDS


def section(rows: Rows) -> tuple[str, list[Verdict]]:
    """Return the text and the verdicts."""
    mine = [row for row in rows.get("claims", []) if "error" not in row["found"]]
    if not mine:
        return "Not measured.", [
            Verdict("A tenth of the lines holds nine tenths of the attention", None, "-"),
            Verdict("Which lines they are, the input decides", None, "-"),
        ]
    texts = [
        "Lines are vertical and slash lines, 2n of them for n tokens; all rows choose, at the price of a line's length. Means over "
        "layers and heads, and in brackets the range over single heads."
    ]
    lines = []
    for row in sorted(mine, key=lambda each: each["unit"]["tokens"]):
        figures = row["found"]
        lines.append(
            [
                f"{row['unit']['tokens']:,}",
                row["unit"]["text"][0],
                *(_ranged(figures[f"{name}_{alpha}"]) for alpha in ("0.9", "0.95") for name in ("lines", "cells")),
            ]
        )
    texts.append(table(["tokens", "text", "lines, 90 %", "cells, 90 %", "lines, 95 %", "cells, 95 %"], lines))
    by_layer = {tokens: _by_layer(mine, tokens, "cells_0.95") for tokens in lengths(mine)}
    texts.append(
        "Cells that hold 95 %, by layer (mean over heads and texts):\n\n"
        + table(
            ["tokens", *(str(layer) for layer in range(len(next(iter(by_layer.values())))))],
            [[f"{tokens:,}", *(f"{100 * value:.0f}" for value in values)] for tokens, values in by_layer.items()],
        )
    )
    pairs = [row for row in mine if row["unit"]["pairs"]]
    verdicts = [_concentrated(mine)]
    if pairs:
        overlap, held, own = (_overall(pairs, name) for name in ("overlap", "held", "own"))
        texts.append(
            "The lines that hold 90 % of one text's attention, on another text of the same kind:\n\n"
            + table(
                ["text", "lines in common (Jaccard)", "held of the other's attention", "held by its own lines"],
                [
                    [row["unit"]["text"][0], *(_ranged(row["found"][name]) for name in ("overlap", "held", "own"))]
                    for row in pairs
                ],
            )
        )
        verdicts.append(
            Verdict(
                "Which lines matter, the input decides: those of two texts overlap by less than half",
                overlap < 0.5,
                f"{percent(overlap)} in common; another text's lines hold {percent(held)} where its own hold {percent(own)}",
                few=_few_kinds(pairs),
            )
        )
    return "\n\n".join(texts), verdicts


def _few_kinds(rows: Sequence[Row]) -> bool:
    return not {row["unit"]["text"][0] for row in rows} >= set(KINDS)


def _flat(values: Sequence[Sequence[float]]) -> list[float]:
    return [each for layer in values for each in layer]


def _ranged(values: Sequence[Sequence[float]]) -> str:
    flat = _flat(values)
    return f"{percent(sum(flat) / len(flat))} ({100 * min(flat):.0f} to {100 * max(flat):.0f})"


def _overall(rows: Sequence[Row], name: str) -> float:
    flat = [each for row in rows for each in _flat(row["found"][name])]
    return sum(flat) / len(flat)


def _by_layer(rows: Sequence[Row], tokens: int, name: str) -> list[float]:
    maps = [row["found"][name] for row in rows if row["unit"]["tokens"] == tokens]
    return [
        sum(each for heads in layers for each in heads) / sum(map(len, layers)) for layers in zip(*maps, strict=True)
    ]


def _concentrated(rows: Sequence[Row]) -> Verdict:
    longest = max(lengths(rows))
    flat = [each for row in rows if row["unit"]["tokens"] == longest for each in _flat(row["found"]["lines_0.9"])]
    share, few = sum(flat) / len(flat), sum(each <= 0.1 for each in flat) / len(flat)
    return Verdict(
        f"A tenth of the lines holds nine tenths of the attention, {longest:,} tokens",
        share <= 0.1,
        f"{percent(share)} of the lines on average; {percent(few, 0)} of the heads need a tenth or less, the worst "
        f"{percent(max(flat), 0)}",
        few=_few_kinds([row for row in rows if row["unit"]["tokens"] == longest]),
    )
