"""Define ``loopserve bench``: timings on this machine. Answers of a model are measured by ``cli.quality``."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loopserve.cli import bench_serve, quality
from loopserve.cli.options import DtypeOption, Format, FormatOption, Settings
from loopserve.cli.output import print_json, print_table
from loopserve.core.errors import ConfigError

if TYPE_CHECKING:
    from loopserve.bench.speed.suite import Suite

app = typer.Typer(help="Measure on this machine: answers and speed.", no_args_is_help=True)
app.command()(quality.run)
app.command()(quality.ls)
app.command()(quality.compare)
app.command()(bench_serve.serve)

SuiteOption = Annotated[str, typer.Option(help="A suite by name (loopserve bench ls), or a YAML file.")]
OutputOption = Annotated[Path | None, typer.Option(help="File of JSON lines that the rows are appended to.")]
RunsOption = Annotated[int | None, typer.Option(min=1, help="Rounds of paired runs; the suite's by default.")]
DeviceOption = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")]


@app.command()
def kernels(
    suite: SuiteOption = "cpu",
    only: Annotated[list[str] | None, typer.Option(help="An operation to measure; may be given several times.")] = None,
    device: DeviceOption = "cpu",
    runs: RunsOption = None,
    output: OutputOption = None,
    format: FormatOption = Format.HUMAN,
) -> None:
    """Each operation beside dense attention, in paired runs.

    An operation whose result differs from its reference on the same inputs gets no time, and the exit code is 1.
    """
    loaded = _suite(suite)
    from loopserve.bench.speed.kernels import check_ops, run_kernels

    rows = run_kernels(loaded, device=device, only=check_ops(only or ()), runs=runs, progress=_progress)
    _show(rows, output, format)


@app.command()
def decode(
    suite: SuiteOption = "cpu",
    device: DeviceOption = "cpu",
    runs: RunsOption = None,
    output: OutputOption = None,
    format: FormatOption = Format.HUMAN,
) -> None:
    """Milliseconds per output token after a long history, re-scoring included, beside transformers' own model."""
    loaded = _suite(suite)
    from loopserve.bench.speed.models import run_decode

    _show(run_decode(loaded, device=device, runs=runs, progress=_progress), output, format)


@app.command()
def prefill(
    suite: SuiteOption = "cpu",
    device: DeviceOption = "cpu",
    runs: RunsOption = None,
    output: OutputOption = None,
    format: FormatOption = Format.HUMAN,
) -> None:
    """Time to first token of a later turn over a long history, and short turns end to end."""
    loaded = _suite(suite)
    from loopserve.bench.speed.models import run_prefill

    _show(run_prefill(loaded, device=device, runs=runs, progress=_progress), output, format)


@app.command()
def conversation(
    suite: SuiteOption = "gpu",
    device: DeviceOption = "cuda",
    output: OutputOption = None,
    format: FormatOption = Format.HUMAN,
) -> None:
    """Time to first token and per token of every turn of a growing conversation, dense and sparse."""
    loaded = _suite(suite)
    from loopserve.bench.speed.models import run_conversation

    _show(run_conversation(loaded, device=device, progress=_progress), output, format)


@app.command()
def report(
    files: Annotated[
        list[Path],
        typer.Argument(metavar="DIR|FILE...", help="A quality run, or speed results in files of JSON lines."),
    ],
    only: Annotated[list[str] | None, typer.Option(help="An operation to show; may be given several times.")] = None,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="A table for a document, with the machine named.")
    ] = False,
    plots: Annotated[
        Path | None, typer.Option(help="Directory that plots of speed are written to (needs matplotlib).")
    ] = None,
    by: Annotated[
        list[str] | None, typer.Option(help="Of a quality run: a label of its tasks to show scores by, repeatable.")
    ] = None,
    output_dir: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Of a quality run: where its page goes. [default: the run's own]")
    ] = None,
    format: FormatOption = Format.HUMAN,
) -> None:
    """A quality run as tables and as a page, or rows of speed as a table and as plots.

    The page (report.html, with plots inside) and its tables (report.md) are written. Of repeated measurements the newest is shown.
    """
    if any(file.is_dir() for file in files):
        if len(files) > 1:
            raise typer.BadParameter("one quality run at a time; loopserve bench compare takes two")
        if plots is not None or only:
            raise typer.BadParameter("--plots and --only are for rows of speed; a run's page has its plots inside")
        quality.report_run(files[0], by or (), markdown, output_dir, format)
        return
    from loopserve.bench import report as speed
    from loopserve.bench.rows import latest, read_rows

    if by or output_dir is not None:
        raise typer.BadParameter("--by and --output-dir are for quality runs: give a run's directory")
    rows = latest(row for file in files for row in read_rows(file))
    if not rows:
        raise ConfigError(f"{', '.join(map(str, files))}: no rows yet")
    shown = [row for row in rows if not only or row["op"] in only]
    if plots is not None:
        from loopserve.bench.figures import plot_speed

        try:
            plots.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"--plots {plots}: no directory can be made there ({error.strerror})") from error
        for path in plot_speed(rows, plots):
            _progress(f"wrote {path}")
    if format is Format.JSON:
        print_json({"rows": shown, "break_even": speed.break_even(rows)})
    elif markdown:
        print(speed.markdown(shown))
    else:
        _print_rows(shown)
        if shown:
            print(speed.machines(shown))


@app.command()
def engine(
    context: typer.Context,
    model: Annotated[str, typer.Option(help="A hub id, a directory, a .gguf file, 'smollm2' or 'demo'.")] = "demo",
    history: Annotated[int, typer.Option(min=1, help="Tokens of the first message.")] = 2048,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each later message.")] = 64,
    output_tokens: Annotated[int, typer.Option(min=2, help="Tokens of each answer.")] = 48,
    runs: Annotated[int, typer.Option(min=2, help="Conversations on each side; medians are compared.")] = 7,
    stack: Annotated[str, typer.Option(help="A preset's name or a YAML file.")] = "dense",
    dtype: DtypeOption = "auto",
    format: FormatOption = Format.HUMAN,
) -> None:
    """Our engine against transformers' own generate.

    Both serve the same conversation with the same model, dense unless another stack is named.
    """
    settings: Settings = context.obj
    settings.stack(stack)  # a misspelt stack is refused before any work
    from loopserve.bench.speed.engine import run_engine_bench

    result: dict[str, Any] = run_engine_bench(
        model=model,
        history=history,
        new_tokens=new_tokens,
        output_tokens=output_tokens,
        runs=runs,
        stack=stack,
        dtype=dtype,
    )
    _show_result(result, format)


@app.command()
def guard(
    context: typer.Context,
    model: Annotated[str, typer.Option(help="A hub id, a directory, a .gguf file, 'smollm2' or 'demo'.")] = "demo",
    stack: Annotated[
        list[str] | None,
        typer.Option(help="A preset's name or a YAML file, repeatable. [default: dense, snapkv, quest, loopserve]"),
    ] = None,
    history: Annotated[int, typer.Option(min=1, help="Tokens of the message.")] = 6144,
    output_tokens: Annotated[int, typer.Option(min=4, help="Tokens of the answer.")] = 64,
    runs: Annotated[int, typer.Option(min=1, help="Answers on each side.")] = 5,
    dtype: DtypeOption = "auto",
    format: FormatOption = Format.HUMAN,
) -> None:
    """A decode step with the guard around policies, and without it, in paired runs."""
    stacks = stack or ["dense", "snapkv", "quest", "loopserve"]
    settings: Settings = context.obj
    settings.stacks(stacks)
    from loopserve.bench.speed.guard import run_guard_bench

    result = run_guard_bench(
        model=model,
        stacks=stacks,
        history=history,
        output_tokens=output_tokens,
        runs=runs,
        dtype=dtype,
        progress=_progress,
    )
    _show_result(result, format)


@app.command()
def batch(
    context: typer.Context,
    model: Annotated[
        str,
        typer.Option(help="A hub id, a directory, a .gguf file, 'smollm2', 'demo', or 'random' (12 layers, 768 wide)."),
    ] = "random",
    stack: Annotated[
        list[str] | None,
        typer.Option(help="A preset's name or a YAML file, repeatable. [default: dense, loopserve, loopserve-paper]"),
    ] = None,
    sessions: Annotated[
        list[int] | None, typer.Option(min=1, help="Sessions at once, repeatable. [default: 1, 2, 4, 8, 16]")
    ] = None,
    history: Annotated[int, typer.Option(min=16, help="Tokens that each session holds.")] = 4096,
    output_tokens: Annotated[int, typer.Option(min=2, help="Tokens of each answer.")] = 24,
    runs: Annotated[int, typer.Option(min=1, help="Paired runs; the fastest of each side is shown.")] = 3,
    wait: Annotated[bool, typer.Option(help="Measure a short prompt beside the prefill of an 8K one instead.")] = False,
    dtype: DtypeOption = "auto",
    output: OutputOption = None,
    format: FormatOption = Format.HUMAN,
) -> None:
    """Decode steps of several sessions in shared passes, beside one session after another."""
    stacks = stack or ["dense", "loopserve", "loopserve-paper"]
    settings: Settings = context.obj
    settings.stacks(stacks)
    from loopserve.bench.rows import append_rows
    from loopserve.bench.speed.engine import SESSIONS, run_batch_bench, run_wait_bench

    if wait:
        result = run_wait_bench(model=model, stack=stacks[0], runs=runs, dtype=dtype, progress=_progress)
    else:
        result = run_batch_bench(
            model=model,
            stacks=stacks,
            sessions=sessions or SESSIONS,
            history=history,
            output_tokens=output_tokens,
            runs=runs,
            dtype=dtype,
            progress=_progress,
        )
    if output is not None:
        append_rows(output, [row | {"machine": result["machine"]} for row in result["rows"]])
    _show_result(result, format)


def _show_result(result: dict[str, Any], format: Format) -> None:
    if format is Format.JSON:
        print_json(result)
        return
    for row in result["rows"]:
        figures = [(name, f"{value:.4g}" if isinstance(value, float) else str(value)) for name, value in row.items()]
        print_table(("figure", "value"), figures)


def _suite(spec: str) -> Suite:
    from loopserve.bench.speed.suite import load_suite

    return load_suite(spec)


def _progress(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def _show(rows: Iterator[dict[str, Any]], output: Path | None, format: Format) -> None:
    """Append each row when it is ready, print all of them, and exit with code 1 if one was wrong."""
    from loopserve.bench.rows import append_rows

    results = []
    for row in rows:
        results.append(row)
        if output is not None:
            append_rows(output, [row])
    if format is Format.JSON:
        print_json({"rows": results})
    else:
        _print_rows(results)
    wrong = [row for row in results if row["parity"] != "ok"]
    for row in wrong:
        print(f"error: {row['op']} ({row['dtype']}) is not timed, its result is wrong: {row['error']}", file=sys.stderr)
    if wrong:
        raise typer.Exit(1)


def _print_rows(rows: Iterable[dict[str, Any]]) -> None:
    from loopserve.bench import report as speed

    rows = list(rows)
    print_table(speed.COLUMNS, speed.table(rows), keys=4, prose=("case", "note"))
    for said in speed.break_even(rows):
        print(f"break-even with SDPA, first turn: {said}")
