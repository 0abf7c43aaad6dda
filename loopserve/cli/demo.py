"""Define ``loopserve demo``: the bundled model holds the same conversations under several stacks, and tables compare them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from loopserve.cli.options import Format, FormatOption, Settings
from loopserve.cli.output import console, milliseconds, number, percent, print_json, print_table, progress, size
from loopserve.core.errors import ConfigError

STACKS = ("dense", "loopserve", "loopserve-paper", "snapkv", "streaming_llm")


def demo(
    context: typer.Context,
    stack: Annotated[
        list[str] | None, typer.Option(help=f"Stacks to compare, repeatable. [default: {', '.join(STACKS)}]")
    ] = None,
    seed: Annotated[int, typer.Option(help="Other seeds give other conversations.")] = 0,
    tokens: Annotated[int, typer.Option(min=64, help="Length of a conversation, in tokens.")] = 2000,
    turns: Annotated[int, typer.Option(min=1, help="Turns of a conversation.")] = 3,
    dialogues: Annotated[int, typer.Option(min=1, help="Conversations per question position.")] = 2,
    format: FormatOption = Format.HUMAN,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.png", help="Draw the result as well.")] = None,
) -> None:
    """Compare stacks on the bundled model.

    Prints answers right, attention computed, keys attended, time and bytes, per turn and over all turns.
    """
    stacks = stack or list(STACKS)
    settings: Settings = context.obj
    if plot is not None:
        _can_plot(plot)
    settings.stacks(stacks)  # a misspelt stack is refused before any work
    from loopserve.bench.demo import run_demo

    with progress(lines=True) as report:
        result = run_demo(stacks=stacks, seed=seed, tokens=tokens, turns=turns, dialogues=dialogues, progress=report)
    if format is Format.JSON:
        print_json(result)
    else:
        render(result)
    if plot is not None:  # last, so that a failing plot does not lose the figures
        from loopserve.bench.figures import plot_demo

        plot_demo(result, plot)


def _can_plot(path: Path) -> None:
    if find_spec("matplotlib") is None:
        raise ConfigError("--plot needs matplotlib: pip install 'loopserve[plot]'")
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise ConfigError(f"--plot {path}: the name must end in .png, .svg or .pdf")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"--plot {path}: there is no directory {path.absolute().parent}")


def render(result: Mapping[str, Any]) -> None:
    """Print one table per turn, one over all turns, and a sentence with the conclusion."""
    stacks: Mapping[str, Mapping[str, Any]] = result["stacks"]
    for turn in range(max((len(each["turns"]) for each in stacks.values()), default=0)):
        rows = {name: each["turns"][turn] for name, each in stacks.items() if turn < len(each["turns"])}
        _print_figures(f"turn {turn + 1}", rows)
    _print_figures("all turns", stacks)
    if all("positions" in each for each in stacks.values()):
        _print_positions(stacks)
    if summary := result.get("summary"):
        console().print(summary, markup=False)


def _print_positions(stacks: Mapping[str, Mapping[str, Any]]) -> None:
    """Print the right answers by the place of the question in its turn."""
    places = next(iter(stacks.values()))["positions"]
    rows = [
        (name, *(f"{each['right']}/{each['asked']}" for each in row["positions"].values()))
        for name, row in stacks.items()
    ]
    print_table(("stack", *places), rows, title="right, by place of the question", right=True)


_COLUMNS: Mapping[str, Callable[[Mapping[str, Any]], str]] = {
    "right": lambda row: f"{row['right']}/{row['asked']}",
    "cells": lambda row: percent(row.get("prefill_cell_density")),
    "tiles": lambda row: percent(row.get("prefill_tile_density")),
    "coverage": lambda row: percent(row.get("coverage_estimated")),
    "realised": lambda row: percent(row.get("coverage_realised")),
    "attended": lambda row: percent(row.get("attended_fraction")),
    "pairs/step": lambda row: number(row.get("attended_pairs")),
    "TTFT": lambda row: milliseconds(row.get("ttft_ms")),
    "TPOT": lambda row: milliseconds(row.get("tpot_ms")),
    "KV read/token": lambda row: size(row.get("kv_bytes_per_token")),
    "store": lambda row: size(row.get("store_bytes")),
    "active": lambda row: size(row.get("active_bytes")),
}


def _print_figures(title: str, rows: Mapping[str, Mapping[str, Any]]) -> None:
    lines = [(name, *(write(row) for write in _COLUMNS.values())) for name, row in rows.items()]
    print_table(("stack", *_COLUMNS), lines, title=title, right=True)
