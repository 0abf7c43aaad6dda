"""The default stack with one field changed at a time."""

from __future__ import annotations

import math

from research.evidence.words import percent, table
from research.evidence_real.comparison import BLOCK
from research.evidence_real.sections.rows import (
    HEADER,
    Cells,
    Rows,
    agreement_cells,
    cells,
    few_kinds,
    lengths,
    on_same,
    shares,
)
from research.evidence_real.sections.verdict import Verdict
from research.evidence_real.summary import Agreement


def section(rows: Rows) -> tuple[str, list[Verdict]]:
    """Return the text and the verdicts."""
    texts = []
    for name, said in (("decode_ablations", "Decoding"), ("prefill_ablations", "Prefill")):
        mine = rows.get(name, [])
        for tokens in lengths(mine):
            for share in shares(mine, tokens) or [None]:
                found = cells(mine, tokens, share)
                if found:
                    texts.append(_fields(said, tokens, found))
    if not texts:
        return "Not measured.", [Verdict("Every field of the default stack earns its place", None, "-")]
    return (
        "One text of each kind. *Change*: of KL against the stack as it is, paired by block, ± its standard error.\n\n"
        + "\n\n".join(texts),
        _field_verdicts(rows),
    )


def difference(one: Agreement, other: Agreement) -> tuple[float, float]:
    """Return the mean difference of KL per token over the blocks that both have, and its standard error."""
    same = on_same(one, other)
    if same is None:
        return math.nan, math.nan
    pairs = [
        (mine - theirs) / BLOCK
        for first, second in zip(same[0].parts, same[1].parts, strict=True)
        for mine, theirs in list(zip(first["kl"], second["kl"], strict=True))[: first["tokens"] // BLOCK]
    ]
    middle = sum(pairs) / len(pairs)
    spread = sum((each - middle) ** 2 for each in pairs) / max(len(pairs) - 1, 1)
    return middle, float((spread / len(pairs)) ** 0.5)


def _fields(said: str, tokens: int, found: Cells) -> str:
    base = found.get("as it is")
    decodes = any(each.attended is not None for each in found.values())
    lines = []
    for label, each in found.items():
        change = "-"
        if base is not None and each is not base and on_same(each, base):
            middle, error = difference(each, base)
            change = f"{middle:+.4f} ± {error:.4f}"
        costs = (
            (each.attended, each.bytes_bf16, each.bytes_all) if decodes else (each.mean("cells"), each.mean("tiles"))
        )
        lines.append([*agreement_cells(label, each), change, *map(percent, costs)])
    header = ["attended", "bytes", "all bytes"] if decodes else ["cells", "tiles"]
    return f"**{said}, {tokens:,} tokens**:\n\n" + table(["field", *HEADER, "change", *header], lines)


def _field_verdicts(rows: Rows) -> list[Verdict]:
    mine = rows.get("decode_ablations", [])
    verdicts = []
    for tokens in lengths(mine):
        for share in shares(mine, tokens):
            found = cells(mine, tokens, share)
            base = found.get("as it is")
            if base is None:
                continue
            better = []
            for label, each in found.items():
                if each is base or not on_same(each, base):
                    continue
                middle, error = difference(each, base)
                fewer = (each.bytes_all or 1.0) <= (base.bytes_all or 1.0) * 1.02
                if middle < -2 * error and fewer:
                    better.append(f"{label} ({middle:+.4f} ± {error:.4f})")
            verdicts.append(
                Verdict(
                    f"No field of `loopserve`'s decoding, changed alone, agrees better for no more bytes, {tokens:,} tokens, "
                    f"{len(found) - 1} changes tried",
                    not better,
                    "; ".join(better) or "none does",
                    few=few_kinds(base),
                )
            )
    return verdicts
