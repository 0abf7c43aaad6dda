"""Claim 7: both phases together, on several tasks, beside whole stacks of others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from research.evidence.pictures import Pictures, dressed, scatter
from research.evidence.recipes import (
    DENSE,
    FULL,
    Recipe,
    average_context,
    decode_preset,
    prefill_policies,
    preset,
    short_prefill,
)
from research.evidence.talks import POSITIONS, at_positions, tallies
from research.evidence.tally import Tally
from research.evidence.units import Row, Unit
from research.evidence.words import milliseconds, percent, points, table, verdict

NAME = "both"
SHARE = 0.10
TASKS: dict[str, dict[str, Any]] = {
    "one key": {"keys": 1},
    "two keys": {"keys": 2},
    "five keys": {"keys": 5},
    "a chain of two": {"keys": 1, "chain": 2},
}


def stacks(tokens: int, turns: int = 3) -> dict[str, Recipe]:
    """Whole stacks at one budget, a share of the context; sizes of prefill policies that fit the length."""
    context = average_context(tokens, turns)
    budget, whole = max(round(SHARE * context) - 6, 48), round(SHARE * context)
    prefills = prefill_policies(tokens)
    ours = short_prefill("loopserve")
    quest: Recipe = preset("quest") | {"decode": {"policy": "quest", "budget": whole, "page": 16}}
    minference = prefills["minference"]["200 + 0 lines"]

    def decoding(name: str) -> Recipe:
        return {"prefill": DENSE, "decode": decode_preset(name, budget)}

    return {
        "dense": {"prefill": DENSE, "decode": FULL},
        "loopserve": {"prefill": ours, "decode": decode_preset("loopserve", whole)},  # counts its outputs
        "loopserve, prefill only": {"prefill": ours, "decode": FULL},
        "loopserve, decoding only": {"prefill": DENSE, "decode": decode_preset("loopserve", whole)},
        "loopserve-paper": {
            "prefill": preset("loopserve-paper")["prefill"],
            "decode": decode_preset("loopserve-paper", budget),
        },
        "snapkv": decoding("snapkv"),
        "adakv": decoding("adakv"),
        "streaming_llm": {"prefill": DENSE, "decode": decode_preset("streaming_llm", whole)},
        "h2o": {"prefill": DENSE, "decode": decode_preset("h2o", whole)},
        "quest, two layers dense": quest,
        "quest, pages of 4": {"prefill": DENSE, "decode": {"policy": "quest", "budget": whole, "page": 4}},
        "a_shape": {"prefill": prefills["a_shape"]["window 256"], "decode": FULL},
        "tri_shape": {"prefill": prefills["tri_shape"]["window 256"], "decode": FULL},
        "minference": {"prefill": minference, "decode": FULL},
        "minference and snapkv": {"prefill": minference, "decode": decode_preset("snapkv", budget)},
        "minference and quest, pages of 4": {
            "prefill": minference,
            "decode": {"policy": "quest", "budget": whole, "page": 4},
        },
        "flexprefill": {"prefill": prefills["flexprefill"]["gamma 0.9"], "decode": FULL},
        "xattention": {"prefill": prefills["xattention"]["threshold 0.95"], "decode": FULL},
    }


def units(tokens: int, dialogues: int, tasks: Sequence[str] = tuple(TASKS)) -> list[Unit]:
    return [
        unit
        for name in tasks
        for label, stack in stacks(tokens).items()
        for unit in at_positions(
            NAME, label, stack, {"tokens": tokens, "turns": 3, **TASKS[name]}, dialogues, seed=800, named=name
        )
    ]


def section(rows: Sequence[Row], pictures: Pictures) -> str:
    by_task = tallies(rows, "named", "label")
    whole = tallies(rows)
    tasks = list(dict.fromkeys(name for name, _ in by_task))
    asked = next(iter(by_task.values())).at("begin").asked
    return "\n\n".join(
        [
            f"A budget of {percent(SHARE, 0)} of the context; {asked} answers per stack, task and position, standard "
            "errors up to "
            f"{100 * max(tally.at(place).error for tally in by_task.values() for place in POSITIONS):.0f} points; "
            "costs over all tasks. TTFT is the "
            "median, one thread.",
            table(
                [
                    "stack",
                    *(f"{name} (begin / middle / end)" for name in tasks),
                    "cells",
                    "tiles",
                    "attended",
                    "bytes",
                    "all bytes",
                    "TTFT ms",
                    "TPOT ms",
                ],
                [_row(label, tally, [by_task[name, label] for name in tasks]) for label, tally in whole.items()],
            ),
            _pareto(whole, pictures),
            *_verdicts(whole),
        ]
    )


def _row(label: str, tally: Tally, by_task: Sequence[Tally]) -> list[str]:
    answers = [" / ".join(str(each.at(place)) for place in POSITIONS) for each in by_task]
    costs = [
        percent(each, 0)
        for each in (tally.cells, tally.tiles, tally.attended, tally.bytes_of_steps, tally.bytes_of_all)
    ]
    return [label, *answers, *costs, milliseconds(tally.ttft_ms()), milliseconds(tally.tpot_ms)]


def _pareto(whole: dict[str, Tally], pictures: Pictures) -> str:
    figure = pictures.figure(11, 4.6)
    reads, computes = figure.subplots(1, 2, sharey=True)
    costs: tuple[tuple[Any, str, Callable[[Tally], float | None]], ...] = (
        (reads, "KV bytes read per output token, everything included", lambda tally: tally.bytes_of_all),
        (computes, "prefill cells computed", lambda tally: tally.cells),
    )
    for axes, name, cost in costs:
        scatter(axes, {label: (cost(tally) or 0.0, tally.right().value) for label, tally in whole.items()})
        front = sorted(_front([(cost(tally) or 0.0, tally.right().value) for tally in whole.values()]))
        axes.step([x for x, _ in front], [y for _, y in front], where="post", color="grey", linewidth=0.8)
        dressed(axes, "", f"{name}, of dense", "answers right, all tasks", shares="xy", ylim=(-0.03, 1.03))
    return pictures.save(figure, "pareto", "Answers right against bytes read and cells computed, by stack")


def _front(pairs: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those that no other beats in both: (cost, gain)."""
    return [
        (cost, gain)
        for cost, gain in pairs
        if not any((a <= cost and b >= gain) and (a, b) != (cost, gain) for a, b in pairs)
    ]


def _verdicts(whole: dict[str, Tally]) -> list[str]:
    dense, ours, paper = (whole[name].right() for name in ("dense", "loopserve", "loopserve-paper"))
    others = {
        label: tally
        for label, tally in whole.items()
        if not label.startswith(("dense", "loopserve")) and tally.right().value >= ours.value
    }
    said = [
        verdict(
            ours.value >= dense.value - 0.03,
            f"the preset answers as well as dense attention over all tasks: {ours.with_error} % beside "
            f"{dense.with_error} %, with "
            f"{percent(whole['loopserve'].cells)} of the cells and {percent(whole['loopserve'].bytes_of_all)} of the "
            "bytes.",
        ),
        verdict(
            paper.value >= dense.value - 0.03,
            f"the method as its paper describes it keeps dense's quality: {paper.with_error} %, "
            f"{points(paper.value - dense.value)}.",
        ),
    ]
    cheaper = [
        label
        for label, tally in others.items()
        if (tally.bytes_of_all or 1.0) <= (whole["loopserve"].bytes_of_all or 1.0)
        and (tally.cells or 1.0) <= (whole["loopserve"].cells or 1.0)
    ]
    if cheaper:
        said.append(
            f"**A rival wins:** {', '.join(f'`{label}`' for label in cheaper)} answers as many at no more bytes and "
            "cells."
        )
    elif others:
        named = [
            f"`{label}` ({percent(tally.cells, 0)} of the cells, {percent(tally.bytes_of_all, 0)} of the bytes)"
            for label, tally in others.items()
        ]
        said.append(
            f"Stacks of others that answer at least as many, each at more cells or more bytes: {', '.join(named)}."
        )
    else:
        said.append("No stack of others answers as many.")
    return said
