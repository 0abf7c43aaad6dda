"""Read rows into figures by stack, and compare stacks on the texts that both were measured on."""

from __future__ import annotations

from collections.abc import Sequence

from research.evidence.units import Row
from research.evidence_real.summary import Agreement
from research.evidence_real.texts import KINDS

Rows = dict[str, list[Row]]
Cells = dict[str, Agreement]


def cells(rows: Sequence[Row], tokens: int, share: float | None = None) -> Cells:
    """Return by label what was measured at a length and share; failed units are left out."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        spec = row["unit"]
        if spec["tokens"] == tokens and spec.get("share") == share and "error" not in row["found"]:
            found.setdefault(spec["label"], []).append(
                row["found"] | {"kind": spec["text"][0], "text": tuple(spec["text"])}
            )
    return {label: Agreement(parts) for label, parts in found.items()}


def lengths(rows: Sequence[Row]) -> list[int]:
    return sorted({row["unit"]["tokens"] for row in rows})


def shares(rows: Sequence[Row], tokens: int) -> list[float]:
    return sorted({row["unit"]["share"] for row in rows if row["unit"]["tokens"] == tokens and "share" in row["unit"]})


def _of_kind(found: Agreement, kind: str) -> str:
    parts = [each for each in found.parts if each["kind"] == kind]
    return f"{Agreement(parts).kl:.4f}" if parts else "-"


def agreement_cells(label: str, found: Agreement) -> list[str]:
    return [
        label,
        f"{found.tokens:,}",
        f"{found.kl:.4f} ± {found.kl_error:.4f}",
        *(_of_kind(found, kind) for kind in KINDS),
        f"{100 * found.same:.1f} ± {100 * found.same_error:.1f} %",
        f"{100 * found.perplexity:+.2f} %",
    ]


HEADER = ["tokens", "KL", *(f"KL, {kind}" for kind in KINDS), "top-1", "perplexity"]


def few_kinds(found: Agreement) -> bool:
    """Return whether a kind of text is missing: kinds differ too much for a verdict from one or two of them."""
    return not {each["kind"] for each in found.parts} >= set(KINDS)


def best_first(found: Cells) -> list[tuple[str, Agreement]]:
    """Return the best first, those measured on more texts before others: means over different texts do not compare."""
    return sorted(found.items(), key=lambda item: (-item[1].tokens, item[1].kl))


def on_same(one: Agreement, other: Agreement) -> tuple[Agreement, Agreement] | None:
    """Return both on the texts that both were measured on, in the same order; None if there is none."""
    ours, theirs = ({each["text"]: each for each in found.parts} for found in (one, other))
    shared = [text for text in ours if text in theirs]
    return (Agreement([ours[t] for t in shared]), Agreement([theirs[t] for t in shared])) if shared else None


def closest_rival(ours: Agreement, rivals: Cells) -> tuple[str, Agreement, Agreement] | None:
    """Return the rival that comes closest to a stack, or beats it most, and both on the same texts.

    Rivals that are measured on less than half as many tokens are not counted.
    """
    pairs = [
        (label, pair)
        for label, each in rivals.items()
        if 2 * each.tokens >= ours.tokens and (pair := on_same(ours, each))
    ]
    if not pairs:
        return None
    label, (mine, theirs) = min(pairs, key=lambda item: item[1][1].kl / max(item[1][0].kl, 1e-9))
    return label, mine, theirs
