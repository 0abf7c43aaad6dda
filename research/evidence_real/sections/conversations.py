"""Agreement by turn of a conversation, with everything kept and with eviction."""

from __future__ import annotations

from research.evidence.units import Row
from research.evidence.words import percent, table
from research.evidence_real.sections.rows import Rows, few_kinds
from research.evidence_real.sections.verdict import Verdict
from research.evidence_real.summary import Agreement


def section(rows: Rows) -> tuple[str, list[Verdict]]:
    """Return the text and the verdicts."""
    mine = [row for row in rows.get("dialogues", []) if "error" not in row["found"]]
    if not mine:
        return "Not measured.", [Verdict("Agreement does not fall over the turns of a conversation", None, "-")]
    found: dict[str, list[list[Row]]] = {}
    for row in mine:
        turns = found.setdefault(row["unit"]["label"], [[] for _ in row["found"]["turns"]])
        for turn, each in zip(turns, row["found"]["turns"], strict=True):
            turn.append(each | {"kind": row["unit"]["text"][0]})
    results = {label: [Agreement(parts) for parts in turns] for label, turns in found.items()}
    tokens, share = mine[0]["unit"]["tokens"], mine[0]["unit"]["share"]
    count = len(next(iter(results.values())))
    lines = [
        [label, *(f"{each.kl:.4f} ± {each.kl_error:.4f}" for each in turns), percent(turns[-1].attended)]
        for label, turns in sorted(results.items(), key=lambda item: item[1][-1].kl)
    ]
    sample = next(iter(results.values()))[0].tokens
    text = (
        f"A text is given in {count} messages, and every answer is the piece that follows, {tokens:,} tokens in all; one budget for "
        f"all turns, {percent(share, 0)} of the whole. Dense prefill over what is kept; KL of the answers by turn, {sample} tokens "
        "per cell. *Attended*: in the last turn, of everything said.\n\n"
        + table(["stack", *(f"turn {turn + 1}" for turn in range(count)), "attended"], lines)
    )
    verdicts = []
    for label in ("snapkv", "adakv"):
        if label in results and f"{label}-evict" in results:
            kept, gone = results[label][-1], results[f"{label}-evict"][-1]
            verdicts.append(
                Verdict(
                    f"Eviction costs agreement in later turns, `{label}`, turn {count}",
                    gone.kl > kept.kl,
                    f"KL {gone.kl:.4f} ± {gone.kl_error:.4f} with eviction, {kept.kl:.4f} ± {kept.kl_error:.4f} with everything kept",
                    few=few_kinds(gone),
                )
            )
    if "loopserve" in results:
        first, last = results["loopserve"][1], results["loopserve"][-1]
        verdicts.append(
            Verdict(
                f"`loopserve` agrees in the last turn as in the second (KL at most twice), {count} turns, {tokens:,} tokens",
                last.kl <= 2 * first.kl,
                f"KL {first.kl:.4f} ± {first.kl_error:.4f} in turn 2, {last.kl:.4f} ± {last.kl_error:.4f} in turn {count}",
                few=few_kinds(last),
            )
        )
    return text, verdicts
