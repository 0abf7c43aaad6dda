"""Define ``loopserve policies``: list policies, their distributions and their options."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loopserve.cli import check, scaffold
from loopserve.cli.options import DeviceOption, DtypeOption, Format, FormatOption, ModelArgument, Settings
from loopserve.cli.output import console, print_json, print_table
from loopserve.core.errors import ConfigError

if TYPE_CHECKING:
    from loopserve.core.policy.registry import Registration

TextOption = Annotated[
    Path | None, typer.Option("--text", help="File with text like the model's work; recall dialogues by default.")
]
TokensOption = Annotated[int, typer.Option(min=64, help="Tokens of the text that are read.")]

app = typer.Typer(help="List policies and their options, check them, write a new one.", no_args_is_help=True)
app.command("new")(scaffold.new)
app.command("check")(check.check)


@app.command("ls")
def list_policies(context: typer.Context, format: FormatOption = Format.HUMAN) -> None:
    """Every policy, with the distribution that brings it."""
    settings: Settings = context.obj
    loaded = settings.plugins()
    if format is Format.JSON:
        print_json(
            {
                "policies": [_described(each) for each in loaded.registry],
                "problems": [{"plugin": each.name, "reason": each.reason} for each in loaded.problems],
                "disabled": list(loaded.disabled),
            }
        )
        return
    rows = [(each.kind, each.name, str(each.owner), each.summary, each.paper) for each in loaded.registry]
    columns = ("kind", "name", "from", "what it does", "paper")
    print_table(columns, rows, keys=2, prose=("from", "what it does"))


@app.command("show")
def show_policy(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="A policy's name, as in `policies ls`.")],
    format: FormatOption = Format.HUMAN,
) -> None:
    """One policy (or both of that name) with its options."""
    settings: Settings = context.obj
    registrations = settings.plugins().registry.named(name)
    if format is Format.JSON:
        print_json([_described(each) | {"options": each.config.model_json_schema()} for each in registrations])
        return
    out = console()
    for each in registrations:
        out.print(f"{each.kind} policy {each.name} (from {each.owner})", markup=False)
        out.print(inspect.getdoc(each.policy) or "", markup=False)
        if each.paper and each.paper not in (each.policy.__doc__ or ""):
            out.print(f"paper: {each.paper}", markup=False, soft_wrap=True)
        able = each.capabilities
        out.print(f"retention: {', '.join(sorted(able.retentions))}" if each.kind == "decode" else "", markup=False)
        if able.needs:
            out.print(f"needs: {', '.join(sorted(able.needs))}", markup=False)
        _print_options(each)


@app.command()
def matrix(context: typer.Context, format: FormatOption = Format.HUMAN) -> None:
    """Every prefill policy beside every decode policy, keeping or evicting: which pairs work, and why others are refused."""
    from loopserve.core.stack.stack import pairs

    settings: Settings = context.obj
    combinations = list(pairs(settings.plugins().registry))
    if format is Format.JSON:
        print_json(
            {
                "pairs": [
                    {
                        "prefill": each.prefill,
                        "decode": each.decode,
                        "retention": each.retention,
                        "works": each.reason is None,
                        "reason": each.reason,
                    }
                    for each in combinations
                ]
            }
        )
        return
    columns = list(dict.fromkeys(each.prefill for each in combinations))
    rows = []
    for decode, retention in dict.fromkeys((each.decode, each.retention) for each in combinations):
        cells = [each.reason for each in combinations if (each.decode, each.retention) == (decode, retention)]
        rows.append((decode, retention, *("works" if reason is None else "refused" for reason in cells)))
    print_table(("decode \\ prefill", "rest", *columns), rows, keys=2)
    out = console()
    for reason in dict.fromkeys(each.reason for each in combinations if each.reason is not None):
        out.print(f"refused: {reason}", markup=False)


@app.command("search-minference")
def search_minference(
    context: typer.Context,
    model: ModelArgument,
    output: Annotated[str, typer.Option("--output", "-o", help="File the sizes are written to (JSON).")],
    text: TextOption = None,
    tokens: TokensOption = 4096,
    share: Annotated[
        float, typer.Option(min=0.001, max=1.0, help="Share of the causal cells a head may compute.")
    ] = 0.2,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
) -> None:
    """Search, once per model, how many vertical and slash lines each head needs; `minference` reads the file as `sizes`."""
    from loopserve.cli.search import searched

    _require_place_for(output)
    sizes = searched(model, text, tokens, share, dtype=dtype, device=device)
    from loopserve.policies.prefill.line_sizes import describe, write_sizes

    write_sizes(output, sizes, model)
    rows = [(each, str(count)) for each, count in describe(sizes).items()]
    print_table(("sizes", "heads"), rows, title=f"written to {output}")


@app.command("search-duo")
def search_duo(
    context: typer.Context,
    model: ModelArgument,
    output: Annotated[str, typer.Option("--output", "-o", help="File the scores are written to (JSON).")],
    text: TextOption = None,
    tokens: TokensOption = 4096,
    sinks: Annotated[int, typer.Option(min=0, help="First tokens that a streaming head attends to.")] = 64,
    recent: Annotated[int, typer.Option(min=1, help="Last tokens that a streaming head attends to.")] = 256,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
) -> None:
    """Measure, once per model, which KV heads look far back; `duo` reads the file as `heads`, in both phases."""
    from loopserve.cli.search import searched_heads

    _require_place_for(output)
    scores = searched_heads(model, text, tokens, sinks, recent, dtype=dtype, device=device)
    from loopserve.policies.head_split import write_scores

    write_scores(output, scores, model)
    rows = [(str(layer), " ".join(f"{score:.3f}" for score in heads)) for layer, heads in scores.items()]
    print_table(("layer", "attention far back, by KV head"), rows, title=f"written to {output}")


def _require_place_for(output: str) -> None:
    """Raise ConfigError if a file cannot be written there; asked before a search, which takes long."""
    if Path(output).is_dir() or not Path(output).absolute().parent.is_dir():
        raise ConfigError(f"{output}: cannot be written: give a file in a directory that is there")


def _described(each: Registration) -> dict[str, Any]:
    able = each.capabilities
    return {
        "kind": each.kind,
        "name": each.name,
        "distribution": each.owner.distribution,
        "version": each.owner.version,
        "summary": each.summary,
        "paper": each.paper,
        "capabilities": {
            "layer_types": sorted(able.layer_types),
            "retentions": sorted(able.retentions),
            "deterministic": able.deterministic,
            "batched": able.batched,
            "needs": sorted(able.needs),
            "wraps": "inner" in each.config.model_fields,
        },
    }


def _print_options(each: Registration) -> None:
    schema = each.config.model_json_schema()
    rows = []
    for name, option in schema.get("properties", {}).items():
        default = repr(option["default"]) if "default" in option else "required"
        rows.append((name, _values(option, schema.get("$defs", {})), default, option.get("description", "")))
    if rows:
        print_table(("option", "values", "default", "meaning"), rows, prose=("values", "meaning"))
    else:
        print("no options")


_BOUNDS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}


def _values(option: dict[str, Any], definitions: dict[str, Any]) -> str:
    """Return the values of an option in short form: ``integer > 0``, ``keep | evict``, ``number | null``."""
    if "$ref" in option:
        return _values(definitions[option["$ref"].rpartition("/")[2]], definitions)
    if "anyOf" in option:
        return " | ".join(_values(each, definitions) for each in option["anyOf"])
    if "enum" in option:
        return " | ".join(map(str, option["enum"]))
    if "const" in option:
        return str(option["const"])
    bounds = [f"{sign} {option[key]}" for key, sign in _BOUNDS.items() if key in option]
    return " ".join([option.get("type", "any"), *bounds])
