"""``loopserve stack``: check, show and describe stack files."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from loopserve.cli.options import Format, FormatOption, Settings
from loopserve.cli.output import print_json
from loopserve.cli.tables import print_table
from loopserve.core.errors import ConfigError

app = typer.Typer(help="Check and show stacks: which policy serves which layer.", no_args_is_help=True)

SpecArgument = Annotated[str, typer.Argument(metavar="NAME|FILE", help="A preset's name or a YAML file.")]


@app.command("ls")
def list_presets(context: typer.Context, format: FormatOption = Format.HUMAN) -> None:
    """The presets."""
    from loopserve.core.stack.stack import load_stack, preset_names

    settings: Settings = context.obj
    registry = settings.plugins().registry
    stacks = [load_stack(name, registry) for name in preset_names()]
    if format is Format.JSON:
        print_json([each.describe() for each in stacks])
        return
    rows = [(each.name, each.prefill.name, each.decode.name, each.description or "") for each in stacks]
    print_table(("name", "prefill", "decode", "what it is for"), rows, prose=("what it is for",))


@app.command()
def validate(
    context: typer.Context,
    specs: Annotated[list[str], typer.Argument(metavar="NAME|FILE...", help="Presets or YAML files.")],
    format: FormatOption = Format.HUMAN,
) -> None:
    """Check stack files; every mistake is printed with its file, line and field."""
    from loopserve.core.stack.stack import load_stack

    settings: Settings = context.obj
    registry = settings.plugins().registry
    results: list[dict[str, Any]] = []
    for spec in specs:
        try:
            loaded = load_stack(spec, registry)
            results.append({"stack": spec, "ok": True, "digest": loaded.digest, "problems": []})
        except ConfigError as error:
            results.append({"stack": spec, "ok": False, "digest": None, "problems": _problems(error)})
    if format is Format.JSON:
        print_json(results)
    else:
        for each in results:
            if each["ok"]:
                print(f"{each['stack']}: ok ({each['digest']})")
            for problem in each["problems"]:
                print(f"error: {problem['text']}", file=sys.stderr)
    if not all(each["ok"] for each in results):
        raise typer.Exit(ConfigError.exit_code)


def _problems(error: ConfigError) -> list[dict[str, Any]]:
    from loopserve.core.stack.config import InvalidDocument

    if not isinstance(error, InvalidDocument):
        return [{"line": None, "field": "", "message": str(error), "text": str(error)}]
    return [
        {"line": each.line, "field": each.field, "message": each.message, "text": str(each)} for each in error.problems
    ]


@app.command()
def show(context: typer.Context, spec: SpecArgument, format: FormatOption = Format.HUMAN) -> None:
    """A stack with every option spelt out, as YAML."""
    from loopserve.core.stack.config import to_yaml

    settings: Settings = context.obj
    loaded = settings.stack(spec)
    if format is Format.JSON:
        print_json(loaded.describe() | {"digest": loaded.digest, "source": loaded.source})
        return
    print(f"# {loaded.source}, digest {loaded.digest}")
    print(to_yaml(loaded.describe()), end="")


@app.command()
def schema(context: typer.Context) -> None:
    """JSON Schema of stack files with the options of all policies, for editors."""
    from loopserve.core.stack.stack_file import stack_schema

    settings: Settings = context.obj
    print_json(stack_schema(settings.plugins().registry))
