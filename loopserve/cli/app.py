"""Define the ``loopserve`` command: its global options, its subcommands, and its exit codes."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from loopserve import __version__
from loopserve.cli import bench, calibrate, chat, demo, env, logs, models, policies, serve, sessions, stack
from loopserve.cli.options import Settings
from loopserve.cli.output import print_error, remember_json, unexpected
from loopserve.core.errors import LoopServeError

app = typer.Typer(
    name="loopserve",
    help="Long multi-turn conversations, faster: sparse prefill and KV selection for transformers models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # importing it would take half of the time limit of --help
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(demo.demo)
app.command()(chat.chat)
app.command()(chat.run)
app.command()(serve.serve)
app.command()(calibrate.calibrate)
app.add_typer(sessions.app, name="sessions")
app.add_typer(logs.app, name="logs")
app.add_typer(policies.app, name="policies")
app.add_typer(stack.app, name="stack")
app.add_typer(bench.app, name="bench")
app.add_typer(models.app, name="models")
app.add_typer(env.kernels_app, name="kernels")
app.command()(env.env)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"loopserve {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    context: typer.Context,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Print per-turn statistics.")] = False,
    strict_plugins: Annotated[
        bool,
        typer.Option("--strict-plugins", envvar="LOOPSERVE_STRICT_PLUGINS", help="A broken plugin ends the program."),
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    context.obj = Settings(verbose, strict_plugins)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0 success, 1 failure, 2 wrong usage, 130 stopped by Ctrl-C."""
    remember_json(False)
    try:
        app(args=arguments, prog_name="loopserve")
    except LoopServeError as error:
        if os.environ.get("LOOPSERVE_TRACEBACK"):
            raise
        print_error(str(error), type(error).__name__)
        sys.exit(error.exit_code)
    except Exception as error:
        if os.environ.get("LOOPSERVE_TRACEBACK"):
            raise
        print_error(f"{unexpected(error)} (LOOPSERVE_TRACEBACK=1 shows where)", type(error).__name__)
        sys.exit(1)
