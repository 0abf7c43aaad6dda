"""Define ``loopserve demo``: a model holds the same conversations under several stacks, and tables compare them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from loopserve.bench.demo_cells import BOOK_COLUMNS, book_cells
from loopserve.cli.options import DtypeOption, Format, FormatOption, Settings
from loopserve.cli.output import console, milliseconds, number, percent, print_json, print_table, progress, size
from loopserve.core.errors import ConfigError, ModelError

STACKS = ("dense", "loopserve", "loopserve-paper", "snapkv", "streaming_llm")
BOOK_STACKS = ("dense", "loopserve", "loopserve-paper", "snapkv", "quest", "streaming_llm")
MODEL = "smollm2"
_TINY = {"seed": 0, "tokens": 2000, "turns": 3, "dialogues": 2}


def demo(
    context: typer.Context,
    model: Annotated[
        str | None,
        typer.Option(help=f"MODEL for a conversation about a novel, or demo, the tiny bundled one. [default: {MODEL}]"),
    ] = None,
    stack: Annotated[
        list[str] | None, typer.Option(help=f"Stacks to compare, repeatable. [default: {', '.join(BOOK_STACKS)}]")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Of demo: other seeds give other conversations. [default: 0]")
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(min=64, help="Of demo: length of a conversation, in tokens. [default: 2000]")
    ] = None,
    turns: Annotated[int | None, typer.Option(min=1, help="Of demo: turns of a conversation. [default: 3]")] = None,
    dialogues: Annotated[
        int | None, typer.Option(min=1, help="Of demo: conversations per question position. [default: 2]")
    ] = None,
    dtype: DtypeOption = "auto",
    format: FormatOption = Format.HUMAN,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.png", help="Draw the result as well.")] = None,
) -> None:
    """Compare stacks: the same conversation under each.

    With a pretrained model the conversation is about chapters of Moby-Dick, of about 4,000 tokens; the answers are printed side by
    side. Without one (no network, no package gguf) or with --model demo, the tiny bundled model shows generated dialogues.
    """
    settings: Settings = context.obj
    given = {"seed": seed, "tokens": tokens, "turns": turns, "dialogues": dialogues}
    options = {name: value for name, value in given.items() if value is not None}
    if plot is not None:
        _can_plot(plot)
    settings.stacks(stack or BOOK_STACKS)  # a misspelt stack is refused before any work
    tiny = model == "demo" or (model is None and bool(options))
    result = None if tiny else _book(model, stack or list(BOOK_STACKS), options, dtype)
    if result is None:
        result = _tiny(stack or list(STACKS), _TINY | options | ({} if dtype == "auto" else {"dtype": dtype}))
    if format is Format.JSON:
        print_json(result)
    elif "conversation" in result.get("settings", {}):
        render_book(result)
    else:
        render(result)
    if plot is not None:  # last, so that a failing plot does not lose the figures
        from loopserve.bench.figures import plot_demo

        plot_demo(result, plot)


def _book(model: str | None, stacks: list[str], options: Mapping[str, int], dtype: str) -> dict[str, Any] | None:
    """Return the result of the conversation about a novel; None if no model was asked for and the default cannot be had."""
    if options:
        raise ConfigError(
            f"--{next(iter(options))} is of the bundled model's dialogues: leave it out, or give --model demo"
        )
    from loopserve.bench.book_demo import run_book_demo
    from loopserve.models.quiet import quiet_libraries

    try:
        with quiet_libraries(), progress(lines=True) as report:
            return run_book_demo(stacks=stacks, progress=report, model=model or MODEL, dtype=dtype)
    except ModelError as error:
        if model is not None:
            raise
        print(f"{error}; going on with the tiny bundled model (--model demo)", file=sys.stderr)
        return None


def _tiny(stacks: list[str], options: Mapping[str, Any]) -> dict[str, Any]:
    from loopserve.bench.demo import run_demo

    with progress(lines=True) as report:
        return run_demo(stacks=stacks, progress=report, **options)


def _can_plot(path: Path) -> None:
    if find_spec("matplotlib") is None:
        raise ConfigError("--plot needs matplotlib: pip install 'loopserve[plot]'")
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise ConfigError(f"--plot {path}: the name must end in .png, .svg or .pdf")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"--plot {path}: there is no directory {path.absolute().parent}")


def render_book(result: Mapping[str, Any]) -> None:
    """Print the answers of all stacks below each question, then one table of the stacks."""
    stacks: Mapping[str, Mapping[str, Any]] = result["stacks"]
    for index, asked in enumerate(result["settings"]["questions"]):
        turns = {name: row["turns"][index] for name, row in stacks.items()}
        rows = [(name, each["answer"] or "(nothing)", "yes" if each["right"] else "no") for name, each in turns.items()]
        first = next(iter(turns.values()))
        length, stated = first["prompt_tokens"] + first["reused_tokens"], asked["stated_in"]
        source = "stated in this turn" if stated == index + 1 else f"stated in turn {stated}"
        title = f"turn {index + 1}, {length:,} tokens: {asked['question']} ({source})"
        print_table(("stack", "answer", "right"), rows, title=title, prose=("answer",))
    figures = [(name, *book_cells(row)) for name, row in stacks.items()]
    print_table(("stack", *BOOK_COLUMNS), figures, title="all turns", right=True)
    if summary := result.get("summary"):
        console().print(summary, markup=False)


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
