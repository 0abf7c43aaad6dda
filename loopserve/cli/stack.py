"""Define ``loopserve stack``: check, show and describe stack files."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loopserve.cli.options import Format, FormatOption, RevisionOption, Settings, TrustOption
from loopserve.cli.output import print_json, print_table
from loopserve.core.errors import ConfigError

if TYPE_CHECKING:
    from loopserve.core.policy.layers import LayerSpec
    from loopserve.core.stack.stack import PolicyStack

app = typer.Typer(help="Check and show stacks: which policy serves which layer.", no_args_is_help=True)

SpecArgument = Annotated[str, typer.Argument(metavar="NAME|FILE", help="A preset's name or a YAML file.")]


@app.command("ls")
def list_presets(context: typer.Context, format: FormatOption = Format.HUMAN) -> None:
    """The presets."""
    from loopserve.core.stack.stack import preset_names, resolve_stack

    settings: Settings = context.obj
    registry = settings.plugins().registry
    stacks = [resolve_stack(name, registry) for name in preset_names()]
    if format is Format.JSON:
        print_json([each.describe() for each in stacks])
        return
    rows = [(each.name, each.prefill.name, each.decode.name, each.description or "") for each in stacks]
    print_table(("name", "prefill", "decode", "what it is for"), rows, prose=("what it is for",))


@app.command()
def validate(
    context: typer.Context,
    specs: Annotated[list[str], typer.Argument(metavar="NAME|FILE...", help="Presets or YAML files.")],
    model: Annotated[
        str | None,
        typer.Option(help="Check the stacks against this model's layers too: a hub id, a directory, or 'demo'."),
    ] = None,
    revision: RevisionOption = None,
    trust_remote_code: TrustOption = False,
    format: FormatOption = Format.HUMAN,
) -> None:
    """Check stack files; every mistake is printed with its file, line and field. Of a model, only the configuration is read."""
    from loopserve.core.stack.stack import resolve_stack

    settings: Settings = context.obj
    registry = settings.plugins().registry
    layers = _layers(model, revision, trust_remote_code) if model is not None else None
    results: list[dict[str, Any]] = []
    for spec in specs:
        try:
            loaded = resolve_stack(spec, registry)
            if layers is not None:
                loaded.check(layers)
            unchecked = [] if layers is not None else _unchecked(loaded)
            results.append(
                {"stack": spec, "ok": True, "digest": loaded.digest, "problems": [], "not_checked": unchecked}
            )
        except ConfigError as error:
            results.append(
                {"stack": spec, "ok": False, "digest": None, "problems": _problems(error), "not_checked": []}
            )
    if format is Format.JSON:
        print_json(results)
    else:
        for each in results:
            if each["ok"]:
                print(f"{each['stack']}: ok ({each['digest']})")
            if each["not_checked"]:
                print(f"  not checked without --model: {'; '.join(each['not_checked'])}")
            for problem in each["problems"]:
                print(f"error: {problem['text']}", file=sys.stderr)
    if not all(each["ok"] for each in results):
        raise typer.Exit(ConfigError.exit_code)


def _layers(model: str, revision: str | None, trust_remote_code: bool) -> Sequence[LayerSpec]:
    from loopserve.models.loading import load_layers

    return load_layers(model, revision=revision, trust_remote_code=trust_remote_code)


def _unchecked(stack: PolicyStack) -> list[str]:
    """Return the properties of a stack that only a model's layers can show."""
    if stack.is_dense:
        return []
    named = [str(layers.as_written()) for override in stack.overrides for layers in override.at]
    has = [f"whether the model has the layers {', '.join(named)}"] if named else []
    return [*has, "whether the policies can serve its layers"]


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
