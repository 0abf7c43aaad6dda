"""Claim 4: an answer moves through the context, and the selection must move with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from research.evidence.pictures import Pictures, dressed, lines
from research.evidence.recipes import DENSE, FULL, Policy, average_context, decode_preset, observing
from research.evidence.talks import talk, tallies
from research.evidence.tally import Tally
from research.evidence.units import Row, Unit
from research.evidence.words import percent, table, verdict

NAME = "moving"
INTERVALS = (1, 4, 8, 16, 32, 64)
FIRST_BLOCKS = ("two_hop", "last_window", "sampled", "dense")
SHARE = 0.10
_KEYS = 5
LONG = {"keys": 19, "code_words": (4, 4)}
"""Options of a task whose answers have at least 128 tokens: many places, each with the longest code that the model was trained on."""


def units(tokens: int, dialogues: int, long_dialogues: int, intervals: Sequence[int] = INTERVALS) -> list[Unit]:
    """Five keys asked, so that an answer visits five places; and long answers."""
    made = []
    outputs = _KEYS * 5.5 / 2
    task = {"tokens": tokens, "turns": 3, "keys": _KEYS, "position": "mixed"}
    for label, interval, first, decode in _policies(round(SHARE * average_context(tokens, 3) - outputs), intervals):
        made.append(
            talk(
                NAME,
                label,
                {"prefill": DENSE, "decode": decode},
                task,
                dialogues,
                seed=400,
                interval=interval,
                first=first,
                answer="five keys",
            )
        )
    long = {"tokens": tokens, "turns": 2, "position": "mixed", **LONG}
    for label, interval, first, decode in _policies(round(SHARE * average_context(tokens, 2) - 64), intervals):
        if label != "observing" or first == "two_hop":
            made.append(
                talk(
                    NAME,
                    label,
                    {"prefill": DENSE, "decode": decode},
                    long,
                    long_dialogues,
                    seed=420,
                    interval=interval,
                    first=first,
                    answer="long",
                )
            )
    return made


def _policies(budget: int, intervals: Sequence[int]) -> list[tuple[str, int, str, Policy]]:
    """(label, n_d, first block, decode policy); an interval of 0 for policies that have none."""
    budget = max(budget, 48)
    found: list[tuple[str, int, str, Policy]] = [("full", 0, "-", FULL)]
    for interval in intervals:
        for first in FIRST_BLOCKS:
            found.append(("observing", interval, first, observing(budget, interval, first_block=first)))
        paper = decode_preset("loopserve-paper", budget, interval=interval)
        found.append(("loopserve-paper", interval, "last_window", paper))
        found.append(
            ("loopserve", interval, "last_window", decode_preset("loopserve", budget, dense_below=1, interval=interval))
        )
    found.append(("snapkv", 0, "-", decode_preset("snapkv", budget)))
    found.append(("quest, pages of 4", 0, "-", {"policy": "quest", "budget": budget + 14, "page": 4}))
    found.append(("quest, pages of 16", 0, "-", {"policy": "quest", "budget": budget + 14, "page": 16}))
    return found


def section(rows: Sequence[Row], pictures: Pictures) -> str:
    found = tallies((row for row in rows if row["unit"]["answer"] == "five keys"), "label", "interval", "first")
    long = tallies((row for row in rows if row["unit"]["answer"] == "long"), "label", "interval", "first")
    dense = found["full", 0, "-"]
    asked = dense.right().asked
    worst = max(tally.parts(_index(0)).error for tally in found.values())
    return "\n\n".join(
        [
            f"Five keys asked, so an answer visits five places: {asked} answers, {asked} parts of each index, standard "
            "errors up to "
            f"{100 * worst:.0f} points, {percent(SHARE, 0)} of the context attended, dense prefill. A part is right if "
            "the answer has "
            f"it word for word. Under compression: share of decode steps that attend to a selection.",
            table(
                [
                    "policy",
                    "n_d",
                    "first block",
                    *(f"part {index + 1}" for index in range(_KEYS)),
                    "whole answers",
                    "under compression",
                    "all bytes",
                ],
                [_row(key, tally) for key, tally in found.items()],
            ),
            _picture(found, dense, pictures),
            *_verdicts(found),
            _long(long),
        ]
    )


def _index(wanted: int) -> Callable[[dict[str, Any], int], bool]:
    return lambda answer, index: index == wanted


def _third(wanted: int) -> Callable[[dict[str, Any], int], bool]:
    return lambda answer, index: index * 3 // len(answer["parts"]) == wanted


def _row(key: tuple[str, int, str], tally: Tally) -> list[str]:
    label, interval, first = key
    parts = [str(tally.parts(_index(index))) for index in range(_KEYS)]
    costs = [percent(tally.compressed, 0), percent(tally.bytes_of_all)]
    return [label, str(interval or "-"), first, *parts, tally.right().with_error, *costs]


def _picture(found: dict[tuple[str, int, str], Tally], dense: Tally, pictures: Pictures) -> str:
    figure = pictures.figure(11, 3.8)
    kinds = (("loopserve-paper", "last_window"), ("observing", "two_hop"), ("loopserve", "last_window"))
    for axes, (label, first) in zip(figure.subplots(1, 3, sharey=True), kinds, strict=True):
        curves = {
            f"n_d {interval}": [(index + 1.0, tally.parts(_index(index)).value) for index in range(_KEYS)]
            for (name, interval, block), tally in found.items()
            if (name, block) == (label, first)
        }
        lines(axes, {**curves, "dense": [(index + 1.0, dense.parts(_index(index)).value) for index in range(_KEYS)]})
        dressed(axes, label, "part of the answer", "parts right", shares="y", ylim=(-0.03, 1.03))
    return pictures.save(figure, "moving", "Parts right by their index in the answer, for each interval")


def _verdicts(found: dict[tuple[str, int, str], Tally]) -> list[str]:
    said = []
    intervals = sorted({interval for _, interval, _ in found if interval})
    first, last = found["loopserve-paper", 16, "last_window"], _KEYS - 1
    start, end = first.parts(_index(0)), first.parts(_index(last))
    said.append(
        verdict(
            end.value < start.value - 2 * end.error if start.value >= 0.1 else None,
            "parts that come later are lost more often when a selection stays: with the paper's scheme and n_d = 16, "
            "part 1 is right in "
            f"{start.with_error} %, part {_KEYS} in {end.with_error} %.",
        )
    )
    best = {interval: found["observing", interval, "two_hop"].parts() for interval in intervals}
    gain = best[intervals[0]].value - best[16].value
    said.append(
        verdict(
            gain > 2 * best[16].error,
            "observing the past alone needs a shorter interval than the published 16: parts right are "
            + ", ".join(f"{share} % at {interval}" for interval, share in best.items())
            + ".",
        )
    )
    dense_block = found["observing", 16, "dense"]
    said.append(
        f"A dense first block hides this: with n_d = 16 and a dense first block {dense_block.parts().with_error} % of "
        "the parts are right, and "
        f"{percent(dense_block.compressed, 0)} of the decode steps are under compression."
    )
    blocks = {name: found["observing", 16, name].parts() for name in ("two_hop", "last_window", "sampled")}
    rival = max(share.value for name, share in blocks.items() if name != "two_hop")
    ahead, error = blocks["two_hop"].value - rival, blocks["two_hop"].error
    said.append(
        verdict(
            None if abs(ahead) <= error else ahead > 0,
            "two hops are the best start at n_d = 16: "
            f"{', '.join(f'{name} {share.with_error} %' for name, share in blocks.items())} of the "
            f"parts right.",
        )
    )
    query = {interval: found["loopserve", interval, "last_window"].parts() for interval in intervals}
    low, high = (bound(query.values(), key=lambda share: share.value) for bound in (min, max))
    said.append(
        verdict(
            high.value - low.value <= 0.03,
            "with a look by the current query (`loopserve`) the interval hardly matters: over all of them "
            f"{low.with_error} % to {high.with_error} % of the parts, dense {found['full', 0, '-'].parts().with_error} %.",
        )
    )
    return said


def _long(found: dict[tuple[str, int, str], Tally]) -> str:
    if not found:
        return ""
    dense = found["full", 0, "-"]
    length = sum(answer["outputs"] for answer in dense.answers) / max(len(dense.answers), 1)
    return "\n\n".join(
        [
            f"**Long answers**: {length:.0f} tokens on average, {dense.right().asked} answers of {LONG['keys']} parts "
            "each. The model was trained on "
            "questions for up to five places, so dense decoding misses parts itself; thirds are thirds of the answer.",
            table(
                [
                    "policy",
                    "n_d",
                    "first block",
                    "parts right",
                    *(f"third {third + 1}" for third in range(3)),
                    "under compression",
                    "all bytes",
                ],
                [
                    [
                        label,
                        str(interval or "-"),
                        first,
                        tally.parts().with_error,
                        *(str(tally.parts(_third(third))) for third in range(3)),
                        percent(tally.compressed, 0),
                        percent(tally.bytes_of_all),
                    ]
                    for (label, interval, first), tally in found.items()
                ],
            ),
        ]
    )
