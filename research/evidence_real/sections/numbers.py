"""Numbers stated in a conversation of three turns, asked for in the last one."""

from __future__ import annotations

import math
from dataclasses import dataclass

from research.evidence.units import Row
from research.evidence.words import percent, table
from research.evidence_real.needles import POSITIONS, TURNS
from research.evidence_real.plan import share_at
from research.evidence_real.sections.rows import Rows
from research.evidence_real.sections.verdict import Verdict

_ENOUGH = 60
"""Answers below which nothing is said of a difference."""


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
        return self.mean("attended")

    def mean(self, name: str) -> float | None:
        """Return the mean of a figure of the answers, where it was measured."""
        values = [each[name] for each in self.answers if each.get(name) is not None]
        return sum(values) / len(values) if values else None


def section(rows: Rows) -> tuple[str, list[Verdict]]:
    """Return the text and the verdicts."""
    mine = [row for row in rows.get("needles", []) if "error" not in row["found"]]
    if not mine:
        return "Not measured.", [Verdict("Facts of earlier turns are found again", None, "-")]
    tokens = mine[0]["unit"]["tokens"]
    answers: dict[float, dict[str, list[Row]]] = {}
    for row in mine:
        spec = row["unit"]
        answers.setdefault(spec["share"], {}).setdefault(spec["label"], []).extend(row["found"]["answers"])
    texts = [
        f"A novel of {tokens:,} tokens is read over {TURNS} turns; two sentences in each turn's part state a number (`The magic "
        "number of the harbour is 48213.`). The last turn's message asks for one of them, at its begin, in its middle or at its "
        "end. Answers are teacher-forced, a digit is right if it is the likeliest token. ± is the standard error between answers. "
        "The prefill is dense, and in the last table each stack's own."
    ]
    verdicts = []
    dense = {label: each for found in answers.values() for label, each in found.items() if label == "dense"}
    for share, found in sorted(answers.items(), key=lambda item: item[0] != share_at(tokens)):
        results = {label: Found(each) for label, each in (dense | found).items()}
        where = f"{tokens:,} tokens, {percent(share, 0)} of the pairs"
        texts.append(f"**{where}**:\n\n{_table(results)}")
        verdicts += _verdicts(results, where)
    if read := _own_prefill(rows):
        results = {label: Found(each) for label, each in dense.items()} | read
        texts.append(f"**{tokens:,} tokens, each stack's own prefill**:\n\n{_table(results)}")
        verdicts += _reading_verdicts(results, tokens)
    return "\n\n".join(texts), verdicts


def _own_prefill(rows: Rows) -> dict[str, Found]:
    answers: dict[str, list[Row]] = {}
    for row in rows.get("needles_whole", []):
        if "error" not in row["found"]:
            answers.setdefault(row["unit"]["label"], []).extend(row["found"]["answers"])
    return {label: Found(each) for label, each in answers.items()}


def _reading_verdicts(results: dict[str, Found], tokens: int) -> list[Verdict]:
    """Say whether what is stated is still found after a sparse prefill, before dense decoding and before that of the stack."""
    verdicts = []
    for label, said in (
        ("loopserve, prefill only", "`loopserve`'s prefill, dense decoding"),
        ("loopserve", "both phases of `loopserve`"),
    ):
        if {"dense", label} <= set(results):
            dense, ours = results["dense"], results[label]
            verdicts.append(
                Verdict(
                    f"Numbers stated turns before are found as under dense attention (within 3 points), {said}, {tokens:,} tokens",
                    ours.digits >= dense.digits - 0.03,
                    f"digits right: {_right(ours)} beside dense's {_right(dense)} ({len(ours.answers)} answers)",
                    few=min(len(ours.answers), len(dense.answers)) < _ENOUGH,
                )
            )
    return verdicts


def _table(results: dict[str, Found]) -> str:
    lines = [
        [
            label,
            str(len(each.answers)),
            f"{100 * each.digits:.0f} ± {100 * each.error:.0f} %",
            percent(each.whole, 0),
            " / ".join(percent(each.where("position", place).digits, 0) for place in POSITIONS),
            " / ".join(percent(each.where("back", back).digits, 0) for back in range(TURNS)),
            percent(each.attended),
            percent(each.mean("cells")),
        ]
        for label, each in sorted(results.items(), key=lambda item: -item[1].digits)
    ]
    header = [
        "stack",
        "answers",
        "digits right",
        "whole numbers right",
        "digits: begin / middle / end",
        "digits: stated in the last turn / one before / two before",
        "attended",
        "cells",
    ]
    return table(header, lines)


def _verdicts(results: dict[str, Found], where: str) -> list[Verdict]:
    if not {"dense", "loopserve"} <= set(results):
        return []
    dense, ours = results["dense"], results["loopserve"]
    count = min(len(dense.answers), len(ours.answers))
    rivals = {label: each for label, each in results.items() if not label.startswith(("dense", "loopserve"))}
    best = max(rivals.items(), key=lambda item: item[1].digits) if rivals else None
    said = f"digits right: {_right(ours)} beside dense's {_right(dense)}" + (
        f"; `{best[0]}` {_right(best[1])}" if best else ""
    )
    verdicts = [
        Verdict(
            f"Numbers stated turns before are found as under dense attention (within 3 points), {where}",
            ours.digits >= dense.digits - 0.03,
            f"{said} ({count} answers)",
            few=count < _ENOUGH,
        )
    ]
    windows = {label: results[label] for label in ("snapkv", "adakv") if label in results}
    if windows:
        verdicts.append(
            Verdict(
                f"Policies that watch the end of the prompt lose answers when the question stands earlier, {where}",
                all(map(_falls, windows.values())),
                "digits right, question at begin / middle / end: "
                + "; ".join(
                    f"`{label}` {' / '.join(percent(each.where('position', place).digits, 0) for place in POSITIONS)}"
                    for label, each in windows.items()
                ),
                few=min(len(each.answers) for each in windows.values()) < _ENOUGH,
            )
        )
    return verdicts


def _falls(found: Found) -> bool:
    """Return whether more is right with the question at the end than at the begin, by more than two standard errors."""
    begin, end = found.where("position", "begin"), found.where("position", "end")
    return end.digits - begin.digits > 2 * math.hypot(begin.error, end.error)


def _right(found: Found) -> str:
    return f"{100 * found.digits:.0f} ± {100 * found.error:.0f} %"
