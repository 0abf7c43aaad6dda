"""Define ``loopserve env``, the facts that a bug report needs, and ``loopserve kernels``: compile the CPU kernels."""

from __future__ import annotations

import platform
from typing import Annotated, Any

import typer

from loopserve.cli.options import Format, FormatOption, Settings
from loopserve.cli.output import print_json
from loopserve.core.errors import ConfigError

_PACKAGES = (
    "torch",
    "transformers",
    "triton",
    "safetensors",
    "pydantic",
    "pluggy",
    "ruamel.yaml",
    "typer",
    "rich",
    "prompt_toolkit",
)


def env(context: typer.Context, format: FormatOption = Format.HUMAN) -> None:
    """Versions, device, kernels and plugins, for a bug report."""
    settings: Settings = context.obj
    environment = _environment(settings)
    if format is Format.JSON:
        print_json(environment)
        return
    _print_tree(environment)


def _print_tree(values: dict[str, Any], indent: str = "") -> None:
    for key, value in values.items():
        if isinstance(value, dict):
            print(f"{indent}{key}:")
            _print_tree(value, indent + "  ")
        elif isinstance(value, list):
            print(f"{indent}{key}: {', '.join(map(str, value)) or 'none'}")
        else:
            print(f"{indent}{key}: {value}")


def _environment(settings: Settings) -> dict[str, Any]:
    import torch

    import loopserve.core.engine.engine  # noqa: F401  # brings in every operation, so that each is described
    from loopserve import __version__
    from loopserve.kernels import backend

    loaded = settings.plugins()
    cuda = torch.cuda.is_available()
    return {
        "loopserve": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "transformers_supported": _required("transformers"),
        "device": {
            "default": "cuda" if cuda else "cpu",
            "name": torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
        },
        "compiled_kernels": _compiled(),
        "kernels": {row["operation"]: f"{row['implementation']} ({row['why']})" for row in backend.describe()},
        "plugins": {each.name: f"{each.owner}: {', '.join(each.policies)}" for each in loaded.plugins},
        "disabled_plugins": list(loaded.disabled),
        "plugin_problems": [str(each) for each in loaded.problems],
    }


def _compiled() -> dict[str, str] | str:
    """Return the compiled library in use, or why there is none."""
    from loopserve.kernels.native import library

    return library.unavailable() or library.describe()


def _version(package: str) -> str:
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _required(package: str) -> str:
    """Return the version range that loopserve requires of a package."""
    from importlib import metadata

    try:
        wanted = metadata.requires("loopserve") or []
    except metadata.PackageNotFoundError:
        return "unknown (loopserve is not installed)"
    return next((each.removeprefix(package) for each in wanted if each.startswith(package)), "any")


kernels_app = typer.Typer(help="The compiled CPU kernels.", no_args_is_help=True)


@kernels_app.command()
def build(
    every_level: Annotated[
        bool,
        typer.Option("--every-level", help="For all instruction sets of this architecture, not this machine's only."),
    ] = False,
) -> None:
    """Compile the kernels into the cache folder, as the first use does; in a container image, before the compiler goes."""
    from loopserve.kernels.native import library
    from loopserve.kernels.native.build import BuildError

    try:
        print(library.build_into_cache(every_level=every_level))
    except BuildError as error:
        raise ConfigError(
            f"the kernels cannot be built: {error}. loopserve works without them, several times slower; "
            "install a C compiler (on Debian: apt install gcc libc6-dev) and repeat this command"
        ) from error
