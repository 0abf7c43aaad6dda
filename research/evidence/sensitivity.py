"""How answers and costs move with alpha, the sample, the budget and the interval."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from loopserve.bench.figures import series_style
from research.evidence.pictures import Pictures, dressed
from research.evidence.recipes import DENSE, FULL, Recipe, average_context, decode_preset, lines_by_alpha, preset
from research.evidence.talks import at_positions, tallies
from research.evidence.tally import Tally
from research.evidence.units import Row, Unit
from research.evidence.words import milliseconds, percent, table

NAME = "sensitivity"
ALPHAS = (0.80, 0.90, 0.95, 0.98, 0.99)
SAMPLES = (16, 32, 64, 128, 256)
BUDGETS = (0.025, 0.05, 0.10, 0.20)
INTERVALS = (1, 4, 8, 16, 32, 64)
_HEADS = {
    "alpha": "alpha (lines by alpha alone, full decoding)",
    "sample": "rows sampled (alpha 0.95, full decoding)",
    "budget": "budget, share of the context (preset)",
    "budget, paper": "budget, share of the context (`loopserve-paper`)",
    "interval": "n_d (preset)",
    "interval, paper": "n_d (`loopserve-paper`)",
}


def units(tokens: int, dialogues: int) -> list[Unit]:
    task = {"tokens": tokens, "turns": 3, "keys": 2}
    return [
        unit
        for label, settings in _stacks(tokens).items()
        for value, stack in settings.items()
        for unit in at_positions(NAME, label, stack, task, dialogues, seed=900, value=value, cover=label == "alpha")
    ]


def _stacks(tokens: int) -> dict[str, dict[float, Recipe]]:
    """By what is moved and its value."""
    context = average_context(tokens, 3)
    ours, papers = lines_by_alpha(), preset("loopserve-paper")["prefill"]
    budgets = {share: max(round(share * context) - 6, 28) for share in BUDGETS}
    tenth = max(round(0.1 * context) - 6, 48)
    return {
        "alpha": {alpha: {"prefill": ours | {"alpha": alpha}, "decode": FULL} for alpha in ALPHAS},
        "sample": {
            count: {"prefill": ours | {"alpha": 0.95, "sample_rows": count}, "decode": FULL} for count in SAMPLES
        },
        "budget": {
            share: {"prefill": ours, "decode": decode_preset("loopserve", budget, dense_below=1)}
            for share, budget in budgets.items()
        },
        "budget, paper": {
            share: {"prefill": DENSE, "decode": decode_preset("loopserve-paper", budget)}
            for share, budget in budgets.items()
        },
        "interval": {
            interval: {"prefill": ours, "decode": decode_preset("loopserve", tenth, interval=interval)}
            for interval in INTERVALS
        },
        "interval, paper": {
            interval: {"prefill": papers, "decode": decode_preset("loopserve-paper", tenth, interval=interval)}
            for interval in INTERVALS
        },
    }


def section(rows: Sequence[Row], pictures: Pictures) -> str:
    found: dict[tuple[str, float], Tally] = tallies(rows, "label", "value")
    header = [
        "value",
        "right",
        "begin / middle / end",
        "cells",
        "tiles",
        "mass held",
        "attended",
        "all bytes",
        "TTFT ms",
    ]
    asked = next(iter(found.values())).right().asked
    parts = [f"Two keys; {asked} answers a row."]
    for label in dict.fromkeys(label for label, _ in found):
        parts.append(f"**{_HEADS[label]}**")
        parts.append(table(header, [_row(value, tally) for (name, value), tally in found.items() if name == label]))
    return "\n\n".join([*parts, _picture(found, pictures)])


def _row(value: float, tally: Tally) -> list[str]:
    places = " / ".join(str(tally.at(place)) for place in ("begin", "middle", "end"))
    costs = [percent(each) for each in (tally.cells, tally.tiles, tally.realised, tally.attended, tally.bytes_of_all)]
    return [f"{value:g}", tally.right().with_error, places, *costs, milliseconds(tally.ttft_ms())]


def _picture(found: dict[tuple[str, float], Tally], pictures: Pictures) -> str:
    alphas = {value: tally for (label, value), tally in found.items() if label == "alpha"}
    figure = pictures.figure(11, 3)
    shown: tuple[tuple[str, Callable[[Tally], float | None]], ...] = (
        ("mass really held", lambda tally: tally.realised),
        ("cells computed", lambda tally: tally.cells),
        ("answers right", lambda tally: tally.right().value),
        ("time to first token, ms", lambda tally: tally.ttft_ms()),
    )
    for axes, (name, height) in zip(figure.subplots(1, 4), shown, strict=True):
        axes.plot(list(alphas), [height(tally) or 0.0 for tally in alphas.values()], **series_style(0))
        if name == "mass really held":
            axes.plot(list(alphas), list(alphas), ":", color="grey")
        dressed(axes, name, "alpha", "", shares="" if "ms" in name else "y")
    return pictures.save(figure, "alpha", "Mass held, cells, answers right and time to first token against alpha")
