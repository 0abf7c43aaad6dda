"""Prefill policies before dense decoding."""

from __future__ import annotations

from research.evidence.words import percent, table
from research.evidence_real.plan import LONGEST
from research.evidence_real.recipes import DEFAULT_PREFILL
from research.evidence_real.sections.rows import (
    HEADER,
    Cells,
    Rows,
    agreement_cells,
    best_first,
    cells,
    few_kinds,
    lengths,
    on_same,
)
from research.evidence_real.sections.verdict import Verdict
from research.evidence_real.summary import Agreement

_PREFILL_LEVEL = 0.005


def section(rows: Rows) -> tuple[str, list[Verdict]]:
    """Return the text and the verdicts."""
    mine = rows["prefill"]
    texts = ["The prompt is read sparsely, the forced tokens densely."]
    verdicts = []
    for tokens in lengths(mine):
        found = cells(mine, tokens)
        dense = found.pop("dense", None)
        if not found:
            continue
        lines = [
            [
                *agreement_cells(label, each),
                percent(each.mean("cells")),
                percent(each.mean("tiles")),
                _times(each, dense),
            ]
            for label, each in best_first(found)
        ]
        texts.append(
            f"**{tokens:,} tokens**. *Time*: of the processor for the whole prefill, of "
            "dense attention's:\n\n" + table(["policy", *HEADER, "cells", "tiles", "time"], lines)
        )
        verdicts += _prefill_verdicts(tokens, found)
    return "\n\n".join(texts), verdicts or [Verdict("Sparse prefill is at dense's level", None, "-")]


def _times(found: Agreement, dense: Agreement | None) -> str:
    mine, theirs = found.mean("seconds"), dense.mean("seconds") if dense else None
    return "-" if not mine or not theirs else f"{mine / theirs:.2f}"


def _prefill_verdicts(tokens: int, found: Cells) -> list[Verdict]:
    bar = 0.15 if tokens < LONGEST else 0.08
    ours = {label: each for label, each in found.items() if label.startswith(("loopserve, ", DEFAULT_PREFILL))}
    inside = {label: each for label, each in ours.items() if round(each.mean("cells") or 1.0, 2) <= bar}
    verdicts = []
    if inside:
        label, best = min(inside.items(), key=lambda item: (few_kinds(item[1]), item[1].kl))
        verdicts.append(
            Verdict(
                f"`loopserve`'s prefill is at dense's level (KL at most {_PREFILL_LEVEL}) with {percent(bar, 0)} of the cells, "
                f"{tokens:,} tokens",
                best.kl <= _PREFILL_LEVEL,
                f"{label}: KL {best.kl:.4f} ± {best.kl_error:.4f} at {percent(best.mean('cells'))}",
                few=few_kinds(best),
            )
        )
    rivals = {label: each for label, each in found.items() if not label.startswith("loopserve")}
    alone = f"No other prefill policy agrees better on fewer cells, {tokens:,} tokens"
    if ours and not rivals:
        verdicts.append(Verdict(alone, None, "-"))
    elif ours:
        ahead = [
            f"`{label}` (KL {pair[1].kl:.4f} at {percent(pair[1].mean('cells'))}, {own} {pair[0].kl:.4f} at "
            f"{percent(pair[0].mean('cells'))})"
            for label, each in rivals.items()
            for own, mine in ours.items()
            if (pair := on_same(mine, each)) and _dominates(pair[1], pair[0])
        ]
        verdicts.append(
            Verdict(
                alone,
                not ahead,
                ", ".join(ahead) or f"none of {len(rivals)} settings measured",
                few=all(map(few_kinds, ours.values())),
            )
        )
    paper, own = found.get("loopserve-paper, alpha 0.95"), ours.get("loopserve, alpha 0.95")
    if paper and own and (same := on_same(own, paper)):
        mine, theirs = same
        verdicts.append(
            Verdict(
                f"At alpha 0.95 mixed rows and cost in tiles agree better than the paper's rows and cost, {tokens:,} tokens",
                mine.kl < theirs.kl,
                f"KL {mine.kl:.4f} ± {mine.kl_error:.4f} at {percent(mine.mean('cells'))} of the cells and "
                f"{percent(mine.mean('tiles'))} of the tiles, the paper's {theirs.kl:.4f} ± {theirs.kl_error:.4f} at "
                f"{percent(theirs.mean('cells'))} and {percent(theirs.mean('tiles'))}",
                few=few_kinds(mine),
            )
        )
    return verdicts


def _dominates(other: Agreement, ours: Agreement) -> bool:
    """Return whether it agrees better and computes fewer cells."""
    return other.kl < ours.kl and (other.mean("cells") or 1.0) < (ours.mean("cells") or 1.0)
