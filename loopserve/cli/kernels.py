"""Define ``loopserve kernels``: compile the CPU kernels before their first use."""

from __future__ import annotations

from typing import Annotated

import typer

from loopserve.core.errors import ConfigError

app = typer.Typer(help="The compiled CPU kernels.", no_args_is_help=True)


@app.command()
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
