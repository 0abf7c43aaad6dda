"""The sections of the page: each gives its text and its verdicts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from research.evidence.units import Row
from research.evidence.words import milliseconds, percent, table
from research.evidence_real.agreement import BLOCK, Agreement
from research.evidence_real.needles import POSITIONS, TURNS
from research.evidence_real.plan import LONGEST, share_at
from research.evidence_real.texts import KINDS

Rows = dict[str, list[Row]]
MODEL = "SmolLM2-135M"
DENSE_LEVEL = 0.01
"""KL in nats up to which decoding counts as dense's."""
_PREFILL_LEVEL = 0.005
_NEAR = 0.02
_ENOUGH = 60
"""Answers below which nothing is said of a difference."""
_AS_MANY = 1.25
"""A rival that attends to more pairs than so many times as many is not compared."""


@dataclass(frozen=True)
class Verdict:
    """One line of the table of verdicts. holds: None if it was not measured. few: the sample is too small for a verdict."""

    claim: str
    holds: bool | None
    figure: str
    model: str = MODEL
    few: bool = False

    @property
    def word(self) -> str:
        if self.few:
            return "too few to tell"
        return "not measured" if self.holds is None else "yes" if self.holds else "no"


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


def _agreement(label: str, found: Agreement) -> list[str]:
    return [
        label,
        f"{found.tokens:,}",
        f"{found.kl:.4f} ± {found.kl_error:.4f}",
        *(_of_kind(found, kind) for kind in KINDS),
        f"{100 * found.same:.1f} ± {100 * found.same_error:.1f} %",
        f"{100 * found.perplexity:+.2f} %",
    ]


_HEADER = ["tokens", "KL", *(f"KL, {kind}" for kind in KINDS), "top-1", "perplexity"]


def _best_first(found: Cells) -> list[tuple[str, Agreement]]:
    """Return the best first, those measured on more texts before others: means over different texts do not compare."""
    return sorted(found.items(), key=lambda item: (-item[1].tokens, item[1].kl))


def on_same(one: Agreement, other: Agreement) -> tuple[Agreement, Agreement] | None:
    """Return both on the texts that both were measured on, in the same order; None if there is none."""
    ours, theirs = ({each["text"]: each for each in found.parts} for found in (one, other))
    shared = [text for text in ours if text in theirs]
    return (Agreement([ours[t] for t in shared]), Agreement([theirs[t] for t in shared])) if shared else None


def _best_rival(ours: Agreement, rivals: Cells) -> tuple[str, Agreement, Agreement] | None:
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


# Decoding.


def decoding(rows: Rows) -> tuple[str, list[Verdict]]:
    """Every decode policy behind a dense prefill."""
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
        [*_agreement(label, each), percent(each.attended), percent(each.bytes_bf16), percent(each.bytes_all)]
        for label, each in _best_first(found)
    ]
    return f"**{tokens:,} tokens, {percent(share, 0)} of the pairs**:\n\n" + table(
        ["stack", *_HEADER, "attended", "bytes", "all bytes"], lines
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
            )
        )
        if paper is not None:
            found_verdicts.append(
                Verdict(
                    f"So is decoding as the paper describes it, {where}",
                    paper.kl <= DENSE_LEVEL,
                    f"KL {paper.kl:.4f} ± {paper.kl_error:.4f}, top-1 {percent(paper.same)}",
                )
            )
        most = _AS_MANY * (ours.attended or 1.0)
        rivals = {
            label: each
            for label, each in found.items()
            if not label.startswith("loopserve") and (each.attended or 1.0) <= most
        }
        closest = _best_rival(ours, rivals)
        if closest is not None:
            best, own, beaten = closest
            found_verdicts.append(
                Verdict(
                    f"No other preset that attends to about as many pairs agrees better, {where}",
                    own.kl <= beaten.kl,
                    f"the closest other is `{best}`: KL {beaten.kl:.4f} ± {beaten.kl_error:.4f} at "
                    f"{percent(beaten.bytes_bf16)} of the bytes, against {own.kl:.4f} on the same texts",
                )
            )
    return found_verdicts or [Verdict("Decoding under `loopserve` is at dense's level", None, "-")]


# Prefill.


def prefilling(rows: Rows) -> tuple[str, list[Verdict]]:
    """Every prefill policy before dense decoding."""
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
                *_agreement(label, each),
                percent(each.mean("cells")),
                percent(each.mean("tiles")),
                _times(each, dense),
            ]
            for label, each in _best_first(found)
        ]
        texts.append(
            f"**{tokens:,} tokens**. *Time*: of the processor for the whole prefill, of "
            "dense attention's:\n\n" + table(["policy", *_HEADER, "cells", "tiles", "time"], lines)
        )
        verdicts += _prefill_verdicts(tokens, found)
    return "\n\n".join(texts), verdicts or [Verdict("Sparse prefill is at dense's level", None, "-")]


def _times(found: Agreement, dense: Agreement | None) -> str:
    mine, theirs = found.mean("seconds"), dense.mean("seconds") if dense else None
    return "-" if not mine or not theirs else f"{mine / theirs:.2f}"


def _prefill_verdicts(tokens: int, found: Cells) -> list[Verdict]:
    bar = 0.15 if tokens < LONGEST else 0.08
    ours = {label: each for label, each in found.items() if label.startswith("loopserve, alpha")}
    inside = {label: each for label, each in ours.items() if (each.mean("cells") or 1.0) <= bar}
    verdicts = []
    if inside:
        label, best = min(inside.items(), key=lambda item: item[1].kl)
        verdicts.append(
            Verdict(
                f"`loopserve`'s prefill is at dense's level (KL at most {_PREFILL_LEVEL}) with {percent(bar, 0)} of the cells, "
                f"{tokens:,} tokens",
                best.kl <= _PREFILL_LEVEL,
                f"{label.removeprefix('loopserve, ')}: KL {best.kl:.4f} ± {best.kl_error:.4f} at {percent(best.mean('cells'))}",
            )
        )
    rivals = {label: each for label, each in found.items() if not label.startswith("loopserve")}
    if ours and rivals:
        ahead = [
            f"`{label}` (KL {pair[1].kl:.4f} at {percent(pair[1].mean('cells'))}, {own} {pair[0].kl:.4f} at "
            f"{percent(pair[0].mean('cells'))})"
            for label, each in rivals.items()
            for own, mine in ours.items()
            if (pair := on_same(mine, each)) and _dominates(pair[1], pair[0])
        ]
        verdicts.append(
            Verdict(
                f"No other prefill policy agrees better on fewer cells, {tokens:,} tokens",
                not ahead,
                ", ".join(ahead) or f"none of {len(rivals)} settings measured",
            )
        )
    paper, own = found.get("loopserve-paper, alpha 0.95"), ours.get("loopserve, alpha 0.95")
    if paper and own and (same := on_same(own, paper)):
        mine, theirs = same
        verdicts.append(
            Verdict(
                f"At alpha 0.95 the preset's rows and cost agree better than the paper's, {tokens:,} tokens",
                mine.kl < theirs.kl,
                f"KL {mine.kl:.4f} ± {mine.kl_error:.4f} at {percent(mine.mean('cells'))} of the cells and "
                f"{percent(mine.mean('tiles'))} of the tiles, the paper's {theirs.kl:.4f} ± {theirs.kl_error:.4f} at "
                f"{percent(theirs.mean('cells'))} and {percent(theirs.mean('tiles'))}",
            )
        )
    return verdicts


def _dominates(other: Agreement, ours: Agreement) -> bool:
    """Return whether it agrees better and computes fewer cells."""
    return other.kl < ours.kl and (other.mean("cells") or 1.0) < (ours.mean("cells") or 1.0)


# Alpha.


def alphas(rows: Rows) -> tuple[str, list[Verdict]]:
    """What a promised coverage gives."""
    measured, texts, verdicts = rows["coverage"], [], []
    texts.append(
        "*Realised*: share of the mass of all rows that the chosen lines hold, mean over heads, layers and texts, measured at the "
        "cost of dense attention. *Estimated*: what the policy believes, from its sampled rows. *Time*: milliseconds of one "
        "thread for the whole turn's prefill."
    )
    for tokens in lengths([*rows["prefill"], *measured]):
        realised = cells(measured, tokens)
        found = realised | cells(rows["prefill"], tokens)
        labels = [label for label in found if ", alpha" in label and label.startswith("loopserve")]
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
                    milliseconds(each.mean("ms")) if each is not all_rows else "-",
                ]
            )
        dense = found.get("dense")
        if dense:
            lines.append(
                ["dense", "100.0 %", "-", "100.0 %", "100.0 %", f"{dense.kl:.4f}", "-", milliseconds(dense.mean("ms"))]
            )
        texts.append(
            f"**{tokens:,} tokens:**\n\n"
            + table(["policy", "realised", "estimated", "cells", "tiles", "KL", "top-1", "time, ms"], lines)
        )
        if realised:
            verdicts += _alpha_verdicts(tokens, realised)
    verdicts += _falling(rows["prefill"])
    return "\n\n".join(texts), verdicts or [Verdict("A promised coverage is kept", None, "-")]


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


# Both.


def both(rows: Rows) -> tuple[str, list[Verdict]]:
    """Stacks with both sides sparse."""
    mine, texts, verdicts = rows["both"], [], []
    for tokens in lengths(mine):
        for share in shares(mine, tokens):
            found = cells(mine, tokens, share)
            if not found:
                continue
            lines = [
                [
                    *_agreement(label, each),
                    *map(percent, (each.attended, each.bytes_bf16, each.mean("cells"), each.mean("tiles"))),
                ]
                for label, each in _best_first(found)
            ]
            texts.append(
                f"**{tokens:,} tokens, {percent(share, 0)} of the pairs**:\n\n"
                + table(["stack", *_HEADER, "attended", "bytes", "cells", "tiles"], lines)
            )
            if "loopserve" in found:
                ours = found["loopserve"]
                others = {label: each for label, each in found.items() if label != "loopserve"}
                best = _best_rival(ours, others)
                verdicts.append(
                    Verdict(
                        f"Both phases of `loopserve` stay near dense (KL at most {_NEAR}), {tokens:,} tokens, "
                        f"{percent(share, 0)} of the pairs",
                        ours.kl <= _NEAR,
                        f"KL {ours.kl:.4f} ± {ours.kl_error:.4f}, top-1 {percent(ours.same)}"
                        + (f"; next `{best[0]}`: {best[2].kl:.4f}" if best else ""),
                    )
                )
    if not texts:
        return "Not measured.", [Verdict("Both phases of `loopserve` stay near dense", None, "-")]
    return "\n\n".join(texts), verdicts


# Fields.


def ablations(rows: Rows) -> tuple[str, list[Verdict]]:
    """One field changed at a time."""
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
        lines.append([*_agreement(label, each), change, *map(percent, costs)])
    header = ["attended", "bytes", "all bytes"] if decodes else ["cells", "tiles"]
    return f"**{said}, {tokens:,} tokens**:\n\n" + table(["field", *_HEADER, "change", *header], lines)


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
                    f"No field of `loopserve`'s decoding, changed alone, agrees better for no more bytes, {tokens:,} tokens",
                    not better,
                    "; ".join(better) or "none of those tried",
                )
            )
    return verdicts


# Numbers to find again.


@dataclass(frozen=True)
class Found:
    """Count answers: digits right and asked, and whole answers right."""

    answers: list[Row]

    @property
    def digits(self) -> float:
        return sum(each["right"] for each in self.answers) / sum(each["of"] for each in self.answers)

    @property
    def whole(self) -> float:
        return sum(each["right"] == each["of"] for each in self.answers) / len(self.answers)

    @property
    def error(self) -> float:
        """Return the standard error of ``digits``, between answers."""
        shares = [each["right"] / each["of"] for each in self.answers]
        middle = sum(shares) / len(shares)
        spread = sum((each - middle) ** 2 for each in shares) / max(len(shares) - 1, 1)
        return float((spread / len(shares)) ** 0.5)

    def where(self, name: str, value: object) -> Found:
        return Found([each for each in self.answers if each[name] == value])

    @property
    def attended(self) -> float | None:
        values = [each["attended"] for each in self.answers if each["attended"] is not None]
        return sum(values) / len(values) if values else None


def needles(rows: Rows) -> tuple[str, list[Verdict]]:
    """Numbers stated in a conversation of three turns."""
    mine = [row for row in rows.get("needles", []) if "error" not in row["found"]]
    if not mine:
        return "Not measured.", [Verdict("Facts of earlier turns are found again", None, "-")]
    found: dict[str, list[Row]] = {}
    for row in mine:
        found.setdefault(row["unit"]["label"], []).extend(row["found"]["answers"])
    results = {label: Found(answers) for label, answers in found.items()}
    tokens, share = mine[0]["unit"]["tokens"], mine[0]["unit"]["share"]
    lines = [
        [
            label,
            f"{100 * each.digits:.0f} ± {100 * each.error:.0f} %",
            percent(each.whole, 0),
            " / ".join(percent(each.where("position", place).digits, 0) for place in POSITIONS),
            " / ".join(percent(each.where("back", back).digits, 0) for back in range(TURNS)),
            percent(each.attended),
        ]
        for label, each in sorted(results.items(), key=lambda item: -item[1].digits)
    ]
    counts = sorted({len(each.answers) for each in results.values()})
    text = (
        f"A novel of {tokens:,} tokens is read over {TURNS} turns; two sentences in each turn's part tell a number (`The magic "
        "number of the harbour is 48213.`). The last turn's message asks for one of them, at its begin, in its middle or at its "
        f"end. Answers are teacher-forced, a digit is right if it is the likeliest token. {counts[0]} answers per stack"
        f"{'' if len(counts) == 1 else f' to {counts[-1]}'}, dense prefill, {percent(share, 0)} of the pairs.\n\n"
        + table(
            [
                "stack",
                "digits right",
                "whole numbers right",
                "digits: begin / middle / end",
                "digits: stated in the last turn / one before / two before",
                "attended",
            ],
            lines,
        )
    )
    verdicts = []
    if {"dense", "loopserve"} <= set(results):
        dense, ours = results["dense"], results["loopserve"]
        rivals = {label: each for label, each in results.items() if not label.startswith(("dense", "loopserve"))}
        best = max(rivals.items(), key=lambda item: item[1].digits) if rivals else None
        said = f"digits right: {percent(ours.digits, 0)} beside dense's {percent(dense.digits, 0)}" + (
            f"; `{best[0]}` {percent(best[1].digits, 0)}" if best else ""
        )
        verdicts.append(
            Verdict(
                f"Numbers stated turns before are found as under dense attention (within 3 points), {tokens:,} tokens, "
                f"{percent(share, 0)} of the pairs",
                ours.digits >= dense.digits - 0.03,
                f"{said} ({len(ours.answers)} answers)",
                few=len(ours.answers) < _ENOUGH,
            )
        )
        windows = {label: results[label] for label in ("snapkv", "adakv") if label in results}
        if windows:
            verdicts.append(
                Verdict(
                    "Policies that watch the end of the prompt lose answers when the question stands earlier",
                    all(
                        each.where("position", "begin").digits < each.where("position", "end").digits
                        for each in windows.values()
                    ),
                    "digits right, question at begin / middle / end: "
                    + "; ".join(
                        f"`{label}` {' / '.join(percent(each.where('position', place).digits, 0) for place in POSITIONS)}"
                        for label, each in windows.items()
                    ),
                    few=len(ours.answers) < _ENOUGH,
                )
            )
    return text, verdicts


# Conversations.


def talks(rows: Rows) -> tuple[str, list[Verdict]]:
    """Agreement by turn, with everything kept and with eviction."""
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
                )
            )
    if "loopserve" in results:
        first, last = results["loopserve"][1], results["loopserve"][-1]
        verdicts.append(
            Verdict(
                f"`loopserve` agrees in the last turn as in the second (KL at most twice), {count} turns, {tokens:,} tokens",
                last.kl <= 2 * first.kl,
                f"KL {first.kl:.4f} ± {first.kl_error:.4f} in turn 2, {last.kl:.4f} ± {last.kl_error:.4f} in turn {count}",
            )
        )
    return text, verdicts


# The paper's claims about attention.


def claims(rows: Rows) -> tuple[str, list[Verdict]]:
    """Concentration and input dependence, by layer and head."""
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
            )
        )
    return "\n\n".join(texts), verdicts


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
    )
