"""Define ``loopserve bench run|ls|compare``: answers of a model under several stacks, and their cost."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loopserve.cli.options import DeviceOption, DtypeOption, Format, FormatOption, Settings
from loopserve.cli.output import print_json, print_table, progress

if TYPE_CHECKING:
    from loopserve.bench.quality.records import Run
    from loopserve.bench.quality.tables import Table


class HistoryKind(StrEnum):
    GOLD = "gold"
    GENERATED = "generated"


def run(
    context: typer.Context,
    suite: Annotated[str, typer.Option(help="A suite by name (loopserve bench ls), or a YAML file.")],
    model: Annotated[str, typer.Option(help="A hub id, a directory, a .gguf file, 'smollm2' or 'demo'.")] = "demo",
    stack: Annotated[
        list[str] | None, typer.Option(help="A preset's name or a YAML file, repeatable; the suite's by default.")
    ] = None,
    tasks: Annotated[list[str] | None, typer.Option(help="A task of the suite, repeatable; all by default.")] = None,
    source: Annotated[
        str | None, typer.Option(help="Where tasks find their data: hub, a folder, or shipped; as the suite says.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Dialogues of each task.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Other seeds give other dialogues.")] = 0,
    attended: Annotated[
        list[float] | None,
        typer.Option(
            help="Share of dense's KV pairs that stacks with a budget attend to, repeatable; 0: their own budget."
        ),
    ] = None,
    history: Annotated[
        HistoryKind | None, typer.Option(help="Answers that the conversation goes on with; the suite's by default.")
    ] = None,
    agreement: Annotated[bool, typer.Option(help="Compare next-token distributions with dense's.")] = True,
    coverage: Annotated[
        bool | None, typer.Option(help="Measure realised coverage, as costly as dense attention; as the suite says.")
    ] = None,
    output_dir: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where the run goes. [default: runs/SUITE-MODEL]")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run that is there.")] = False,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    format: FormatOption = Format.HUMAN,
) -> None:
    """Ask a suite of dialogues under several stacks.

    Each dialogue is written as soon as it is answered: a run that was stopped goes on with --resume.
    """
    settings: Settings = context.obj
    from loopserve.bench.quality.runner import run_suite
    from loopserve.bench.quality.suite import load_suite, with_source

    loaded = load_suite(suite) if source is None else with_source(load_suite(suite), source)
    stacks = settings.stacks(stack or loaded.stacks)  # a misspelt stack is refused before any work
    directory = output_dir or Path("runs") / f"{loaded.name}-{Path(model).name}"
    with progress() as report:
        found = run_suite(
            loaded,
            model=model,
            stacks=stacks,
            attended=attended,
            tasks=tasks or (),
            limit=limit,
            seed=seed,
            history=history.value if history is not None else None,
            agreement=agreement,
            coverage=coverage,
            directory=directory,
            resume=resume,
            device=device,
            dtype=dtype,
            progress=lambda step: report(f"{step.task} {step.stack}", step.done, step.total),
        )
    for task, lines in found.identity["suite"]["found"].items():
        for line in lines:  # facts found while its data were read
            print(f"{task}: {line}", file=sys.stderr)
    print(f"records: {directory} (loopserve bench report {directory})", file=sys.stderr)
    show_run(found, (), format)


def ls(context: typer.Context, format: FormatOption = Format.HUMAN) -> None:
    """Suites, tasks and stacks."""
    from loopserve.bench.quality.suite import load_suite
    from loopserve.bench.suite_files import SuiteKind, suite_files
    from loopserve.bench.tasks import known_tasks
    from loopserve.core.stack.stack import preset_names

    suites = {name: load_suite(str(path)) for name, path in suite_files(SuiteKind.QUALITY).items()}
    tasks = known_tasks()
    if format is Format.JSON:
        print_json(
            {
                "suites": {name: suite.model_dump() for name, suite in suites.items()},
                "speed_suites": list(suite_files(SuiteKind.SPEED)),
                "tasks": {
                    name: {"about": kind.about, "options": kind.options.model_json_schema()}
                    for name, kind in tasks.items()
                },
                "stacks": preset_names(),
            }
        )
        return
    rows = [
        (name, ", ".join(_task_names(suite.tasks)), ", ".join(suite.stacks), suite.description)
        for name, suite in suites.items()
    ]
    print_table(("suite", "tasks", "stacks", "what for"), rows, prose=("tasks", "stacks", "what for"))
    print_table(("task", "what it asks"), [(name, kind.about) for name, kind in tasks.items()], prose=("what it asks",))
    print(f"stacks: {', '.join(preset_names())}")
    print(f"suites of speed: {', '.join(suite_files(SuiteKind.SPEED))}")


def compare(
    a: Annotated[str, typer.Argument(metavar="A", help="A run's directory; with --run, a stack of it.")],
    b: Annotated[str, typer.Argument(metavar="B", help="What is held against it.")],
    run: Annotated[Path | None, typer.Option(metavar="DIR", help="The run that holds both stacks.")] = None,
    format: FormatOption = Format.HUMAN,
) -> None:
    """Paired differences of two runs, or of two stacks of one run, with confidence intervals.

    Says which differences are more than noise.
    """
    from loopserve.bench.quality.records import open_run
    from loopserve.bench.quality.tables import compare_runs, compare_stacks, comparison_table

    one_run = None if run is None else open_run(run)
    differences = compare_stacks(one_run, a, b) if one_run else compare_runs(open_run(Path(a)), open_run(Path(b)))
    if format is Format.JSON:
        print_json({"a": a, "b": b, "differences": [each.as_dict() for each in differences]})
    else:
        print(f"A: {a}, B: {b}")
        _print(comparison_table(differences))


def report_run(directory: Path, by: Sequence[str], markdown: bool, output_dir: Path | None, format: Format) -> None:
    """The tables of a run, on the terminal and as files: report.html with plots, report.md."""
    from loopserve.bench.quality import page
    from loopserve.bench.quality.records import open_run
    from loopserve.bench.quality.tables import GROUPS
    from loopserve.core.errors import ConfigError, did_you_mean

    found = open_run(directory)
    known = {*GROUPS, *(label for record in found.records for label in record.get("labels", ()))}
    for label in by:
        if label not in known:
            raise ConfigError(f"--by {label}: no turn of this run has such a label{did_you_mean(label, known)}")
    text = page.markdown(found, by)
    for name, content in (("report.html", page.page(found, by)), ("report.md", text)):
        path = (output_dir or directory) / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content, encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"{path}: cannot be written ({error.strerror})") from error
        print(f"wrote {path}", file=sys.stderr)
    if markdown:
        print(text, end="")
    else:
        show_run(found, by, format)


def show_run(found: Run, by: Sequence[str], format: Format) -> None:
    from loopserve.bench.quality.summary import summarise
    from loopserve.bench.quality.tables import tables

    if format is Format.JSON:
        groups = (("stack",), ("stack", "task", "position"), ("stack", "turn"), *(("stack", label) for label in by))
        rows = {"_".join(group): summarise(found.records, *group) for group in groups}
        errors = [record for record in found.records if "error" in record]
        print_json({"identity": found.identity, "sessions": found.sessions, "rows": rows, "errors": errors})
        return
    for each in tables(found, by):
        _print(each)


def _print(shown: Table) -> None:
    if shown.rows:
        print_table(shown.columns, shown.rows, title=shown.title, right=True)
    else:
        print(f"{shown.title}: {shown.note}")


def _task_names(entries: Sequence[dict[str, Any]]) -> list[str]:
    return [str(entry.get("name") or entry.get("task")) for entry in entries]
