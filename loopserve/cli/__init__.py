"""Arguments in, tables out. Nothing here imports torch before a command runs, so that ``--help`` is instant."""

from loopserve.cli.app import main

__all__ = ["main"]
