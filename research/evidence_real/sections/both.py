"""Stacks with both sides sparse."""

from __future__ import annotations

from research.evidence.words import percent, table
from research.evidence_real.sections.rows import (
    HEADER,
    Rows,
    agreement_cells,
    best_first,
    cells,
    closest_rival,
    few_kinds,
    lengths,
    shares,
)
from research.evidence_real.sections.verdict import Verdict

_NEAR = 0.02


def section(rows: Rows) -> tuple[str, list[Verdict]]:
    """Return the text and the verdicts."""
    mine, texts, verdicts = rows["both"], [], []
    for tokens in lengths(mine):
        for share in shares(mine, tokens):
            found = cells(mine, tokens, share)
            if not found:
                continue
            lines = [
                [
                    *agreement_cells(label, each),
                    *map(percent, (each.attended, each.bytes_bf16, each.mean("cells"), each.mean("tiles"))),
                ]
                for label, each in best_first(found)
            ]
            texts.append(
                f"**{tokens:,} tokens, {percent(share, 0)} of the pairs**:\n\n"
                + table(["stack", *HEADER, "attended", "bytes", "cells", "tiles"], lines)
            )
            if "loopserve" in found:
                ours = found["loopserve"]
                others = {label: each for label, each in found.items() if label != "loopserve"}
                best = closest_rival(ours, others)
                verdicts.append(
                    Verdict(
                        f"Both phases of `loopserve` stay near dense (KL at most {_NEAR}), {tokens:,} tokens, "
                        f"{percent(share, 0)} of the pairs",
                        ours.kl <= _NEAR,
                        f"KL {ours.kl:.4f} ± {ours.kl_error:.4f}, top-1 {percent(ours.same)}"
                        + (f"; next `{best[0]}`: {best[2].kl:.4f}" if best else ""),
                        few=few_kinds(ours),
                    )
                )
    if not texts:
        return "Not measured.", [Verdict("Both phases of `loopserve` stay near dense", None, "-")]
    return "\n\n".join(texts), verdicts
