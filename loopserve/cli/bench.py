"""``loopserve bench``: timings on this machine."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from loopserve.cli.options import Format, FormatOption, Settings
from loopserve.cli.output import console, print_json, table

app = typer.Typer(help="Measure on this machine.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Keeps ``bench`` a group while it has a single command."""


@app.command()
def engine(
    context: typer.Context,
    model: Annotated[str, typer.Option(help="A hub id, a local directory, or 'demo'.")] = "demo",
    history: Annotated[int, typer.Option(min=1, help="Tokens of the first message.")] = 2048,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each later message.")] = 64,
    output_tokens: Annotated[int, typer.Option(min=2, help="Tokens of each answer.")] = 48,
    runs: Annotated[int, typer.Option(min=2, help="Conversations on each side; medians are compared.")] = 7,
    stack: Annotated[str, typer.Option(help="A preset's name or a YAML file.")] = "dense",
    format: FormatOption = Format.HUMAN,
) -> None:
    """Our engine against transformers' own generate.

    Both serve the same conversation with the same model, dense unless another stack is named.
    """
    settings: Settings = context.obj
    settings.stack(stack)  # a misspelt stack is refused before any work
    from loopserve.bench.engine import run_engine_bench

    result: dict[str, Any] = run_engine_bench(
        model=model, history=history, new_tokens=new_tokens, output_tokens=output_tokens, runs=runs, stack=stack
    )
    if format is Format.JSON:
        print_json(result)
        return
    for row in result["rows"]:
        figures = table("figure", "value")
        for name, value in row.items():
            figures.add_row(name, f"{value:.4g}" if isinstance(value, float) else str(value))
        console().print(figures)
