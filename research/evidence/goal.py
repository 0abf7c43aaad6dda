"""The bar: dense's answers at a fifth of its bytes per output token and a quarter of its prefill cells."""

from __future__ import annotations

from collections.abc import Sequence

from research.evidence.pictures import Pictures, dressed, scatter
from research.evidence.recipes import (
    DENSE,
    FULL,
    TWO_HOP,
    Recipe,
    average_context,
    decode_preset,
    lines_by_alpha,
    observing,
)
from research.evidence.talks import POSITIONS, at_positions, tallies
from research.evidence.tally import Tally, paired
from research.evidence.units import Row, Unit
from research.evidence.words import percent, table, verdict

NAME = "goal"
_BYTES, _CELLS, _LOSS = 0.20, 0.25, 0.03


def units(tokens: int, dialogues: int) -> list[Unit]:
    task = {"tokens": tokens, "turns": 3, "keys": 2}
    return [
        unit
        for label, stack in _stacks(tokens).items()
        for unit in at_positions(NAME, label, stack, task, dialogues, seed=1000)
    ]


def _stacks(tokens: int) -> dict[str, Recipe]:
    context = average_context(tokens, 3)
    ours = lines_by_alpha()
    quick = ours | {"alpha": 0.95}

    def decoding(share: float, prefill: dict[str, object] = ours, **changes: object) -> Recipe:
        budget = max(round(share * context) - 6, 30)
        return {"prefill": prefill, "decode": decode_preset("loopserve", budget, dense_below=1, **changes)}

    return {
        "dense": {"prefill": DENSE, "decode": FULL},
        "preset, 10 %": decoding(0.10),
        "preset, 5 %": decoding(0.05),
        "preset, 3 %": decoding(0.03),
        "5 %, pages of 16": decoding(0.05, page=16),
        "5 %, pages of 32": decoding(0.05, page=32),
        "5 %, pages of 128": decoding(0.05, page=128),
        "5 %, codes of 4 bits": decoding(0.05, key_bits=4),
        "5 %, two hops": decoding(0.05, **TWO_HOP),
        "5 %, two hops, pages of 32": decoding(0.05, page=32, **TWO_HOP),
        "5 %, sampled rows first": decoding(0.05, first_block="sampled"),
        "5 %, alpha 0.95": decoding(0.05, quick),
        "observing every 4, 10 %": {"prefill": ours, "decode": observing(round(0.10 * context) - 6, 4)},
        "quest, pages of 16, 10 %": {
            "prefill": ours,
            "decode": {"policy": "quest", "budget": round(0.10 * context), "page": 16},
        },
        "quest, pages of 4, 10 %": {
            "prefill": ours,
            "decode": {"policy": "quest", "budget": round(0.10 * context), "page": 4},
        },
    }


def section(rows: Sequence[Row], pictures: Pictures) -> str:
    found: dict[str, Tally] = tallies(rows)
    dense = found["dense"]
    tokens = rows[0]["unit"]["task"]["tokens"]
    passed = {label: tally for label, tally in found.items() if label != "dense" and _passes(tally, dense)}
    asked = dense.at("begin").asked
    bar = (
        f"at most {percent(_BYTES, 0)} of dense's KV bytes read per output token, everything included, and at most "
        f"{percent(_CELLS, 0)} of the prefill cells, within {100 * _LOSS:.0f} points of dense at every position"
    )
    if passed:
        best = min(passed, key=lambda label: passed[label].bytes_of_all or 1.0)
        said = (
            f"two keys, {tokens:,} tokens: `{best}` reads {percent(passed[best].bytes_of_all)} of the bytes and "
            "computes "
            f"{percent(passed[best].cells)} of the cells. The bar is {bar}."
        )
    else:
        said = f"no stack tried meets the bar ({bar}). The frontier is in the table and the picture."
    return "\n\n".join(
        [
            verdict(bool(passed), said),
            f"{asked} answers per stack and position, standard errors up to "
            f"{100 * max(tally.at(place).error for tally in found.values() for place in POSITIONS):.0f} points. "
            "Differences are paired, over the same "
            "dialogues, with their standard error between dialogues; bytes of decode steps, and with what is read "
            "before the first output.",
            table(
                [
                    "stack",
                    *(f"right, {place}" for place in POSITIONS),
                    "difference to dense",
                    "cells",
                    "tiles",
                    "attended",
                    "bytes",
                    "all bytes",
                    "meets the bar",
                ],
                [_row(label, tally, dense, label in passed) for label, tally in found.items()],
            ),
            _picture(found, pictures),
        ]
    )


def _passes(tally: Tally, dense: Tally) -> bool:
    near = all(tally.at(place).value >= dense.at(place).value - _LOSS - 1e-9 for place in POSITIONS)
    return near and (tally.bytes_of_all or 1.0) <= _BYTES and (tally.cells or 1.0) <= _CELLS


def _row(label: str, tally: Tally, dense: Tally, passed: bool) -> list[str]:
    difference, error = paired(tally, dense)
    costs = [
        percent(each) for each in (tally.cells, tally.tiles, tally.attended, tally.bytes_of_steps, tally.bytes_of_all)
    ]
    answers = [tally.at(place).with_error for place in POSITIONS]
    compared = "-" if label == "dense" else f"{100 * difference:+.1f} ± {100 * error:.1f}"
    return [label, *answers, compared, *costs, "-" if label == "dense" else "yes" if passed else "no"]


def _picture(found: dict[str, Tally], pictures: Pictures) -> str:
    figure = pictures.figure(7.5, 4.2)
    axes = figure.subplots()
    worst = {label: min(tally.at(place).value for place in POSITIONS) for label, tally in found.items()}
    scatter(axes, {label: (tally.bytes_of_all or 1.0, worst[label]) for label, tally in found.items()})
    axes.axvline(_BYTES, color="grey", linestyle=":")
    dressed(
        axes,
        "",
        "KV bytes read per output token, everything included, of dense",
        "answers right at the worst position",
        shares="xy",
    )
    return pictures.save(figure, "goal", "Answers right at the worst position against bytes read")
