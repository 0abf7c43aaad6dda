"""Decode policies behind a dense prefill."""

from __future__ import annotations

from collections.abc import Sequence

from research.evidence.units import Row
from research.evidence.words import percent, table
from research.evidence_real.plan import share_at
from research.evidence_real.sections.rows import (
    HEADER,
    Cells,
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

DENSE_LEVEL = 0.01
"""KL in nats up to which decoding counts as dense's."""
_AS_MANY = 1.25
"""A rival that attends to more pairs than so many times as many is not compared."""


def section(rows: Rows) -> tuple[str, list[Verdict]]:
    """Return the text and the verdicts."""
    mine = rows["decode"]
    texts = ["The prefill is dense; presets decode at the same share of the pairs."]
    for tokens in lengths(mine):
        for share in shares(mine, tokens):
            found = cells(mine, tokens, share)
            if found:
                texts.append(_decode_table(tokens, share, found))
    return "\n\n".join(texts), _decode_verdicts(mine)


def _decode_table(tokens: int, share: float, found: Cells) -> str:
    lines = [
        [*agreement_cells(label, each), percent(each.attended), percent(each.bytes_bf16), percent(each.bytes_all)]
        for label, each in best_first(found)
    ]
    return f"**{tokens:,} tokens, {percent(share, 0)} of the pairs**:\n\n" + table(
        ["stack", *HEADER, "attended", "bytes", "all bytes"], lines
    )


def _decode_verdicts(mine: Sequence[Row]) -> list[Verdict]:
    found_verdicts = []
    for tokens in lengths(mine) or [4096]:
        share = share_at(tokens)
        found = cells(mine, tokens, share)
        where = f"{tokens:,} tokens, {percent(share, 0)} of the pairs"
        ours, paper = found.get("loopserve"), found.get("loopserve-paper")
        if ours is None:
            continue
        found_verdicts.append(
            Verdict(
                f"Decoding under `loopserve` is at dense's level (KL at most {DENSE_LEVEL}), {where}",
                ours.kl <= DENSE_LEVEL,
                f"KL {ours.kl:.4f} ± {ours.kl_error:.4f}, top-1 {percent(ours.same)}, {percent(ours.bytes_bf16)} of the bytes",
                few=few_kinds(ours),
            )
        )
        if paper is not None:
            found_verdicts.append(
                Verdict(
                    f"So is decoding as the paper describes it, {where}",
                    paper.kl <= DENSE_LEVEL,
                    f"KL {paper.kl:.4f} ± {paper.kl_error:.4f}, top-1 {percent(paper.same)}",
                    few=few_kinds(paper),
                )
            )
        most = _AS_MANY * (ours.attended or 1.0)
        rivals = {
            label: each
            for label, each in found.items()
            if not label.startswith("loopserve") and (each.attended or 1.0) <= most
        }
        closest = closest_rival(ours, rivals)
        if closest is not None:
            best, own, beaten = closest
            found_verdicts.append(
                Verdict(
                    f"No other preset that attends to about as many pairs agrees better, {where}",
                    own.kl <= beaten.kl,
                    f"the closest other is `{best}`: KL {beaten.kl:.4f} ± {beaten.kl_error:.4f} at "
                    f"{percent(beaten.bytes_bf16)} of the bytes, against {own.kl:.4f} on the same texts",
                    few=few_kinds(ours),
                )
            )
    return found_verdicts or [Verdict("Decoding under `loopserve` is at dense's level", None, "-")]
