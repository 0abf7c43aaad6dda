"""Compare the share alpha that lines were chosen to hold with the share that they hold."""

from __future__ import annotations

from collections.abc import Sequence

from research.evidence.units import Row
from research.evidence.words import percent, table
from research.evidence_real.sections.rows import Cells, Rows, cells, few_kinds, lengths
from research.evidence_real.sections.verdict import Verdict
from research.evidence_real.summary import Agreement


def section(rows: Rows) -> tuple[str, list[Verdict]]:
    """Return the text and the verdicts."""
    measured, texts, verdicts = rows["coverage"], [], []
    texts.append(
        "*Realised*: share of the mass of all rows that the chosen lines hold, mean over heads, layers and texts, measured at the "
        "cost of dense attention. *Estimated*: what the policy believes, from its sampled rows. *Time*: seconds of one "
        "processor for the whole turn's prefill."
    )
    for tokens in lengths([*rows["prefill"], *measured]):
        realised = cells(measured, tokens)
        found = realised | cells(rows["prefill"], tokens)
        labels = [label for label in found if label.startswith("loopserve")]
        if not labels:
            continue
        lines = []
        for label in labels:
            each, all_rows = found[label], realised.get(label)
            lines.append(
                [
                    label,
                    percent(all_rows.mean("realised")) if all_rows else "-",
                    percent(each.mean("coverage")),
                    percent(each.mean("cells")),
                    percent(each.mean("tiles")),
                    f"{each.kl:.4f} ± {each.kl_error:.4f}",
                    percent(each.same),
                    _seconds(each) if each is not all_rows else "-",
                ]
            )
        dense = found.get("dense")
        if dense:
            lines.append(["dense", "100.0 %", "-", "100.0 %", "100.0 %", f"{dense.kl:.4f}", "-", _seconds(dense)])
        texts.append(
            f"**{tokens:,} tokens:**\n\n"
            + table(["policy", "realised", "estimated", "cells", "tiles", "KL", "top-1", "time, s"], lines)
        )
        if realised:
            verdicts += _alpha_verdicts(tokens, realised)
    verdicts += _falling(rows["prefill"])
    return "\n\n".join(texts), verdicts or [Verdict("A promised coverage is kept", None, "-")]


def _seconds(found: Agreement) -> str:
    value = found.mean("seconds")
    return "-" if value is None else f"{value:.1f}"


def _alpha_verdicts(tokens: int, realised: Cells) -> list[Verdict]:
    kept = {
        label: (float(label.rpartition(" ")[2]), value)
        for label, each in realised.items()
        if label.startswith("loopserve, alpha") and (value := each.mean("realised")) is not None
    }
    if not kept:
        return []
    worst = min(kept.values(), key=lambda pair: pair[1] - pair[0])
    return [
        Verdict(
            f"The lines chosen from sampled rows hold at least the share alpha of all rows' mass, {tokens:,} tokens",
            all(value >= alpha - 0.005 for alpha, value in kept.values()),
            f"alpha {worst[0]:g} gives {percent(worst[1])}",
            few=any(few_kinds(realised[label]) for label in kept),
        )
    ]


def _falling(mine: Sequence[Row]) -> list[Verdict]:
    by_length = {}
    for tokens in lengths(mine):
        each = cells(mine, tokens).get("loopserve, alpha 0.95")
        if each is not None and each.mean("cells") is not None:
            by_length[tokens] = each.mean("cells") or 0.0
    if len(by_length) < 2:
        return []
    first, last = min(by_length), max(by_length)
    shares = ", ".join(f"{percent(value)} at {tokens:,}" for tokens, value in sorted(by_length.items()))
    return [
        Verdict(
            "The share of the cells that alpha 0.95 needs falls with length", by_length[last] < by_length[first], shares
        )
    ]
