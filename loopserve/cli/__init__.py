"""Parse arguments and print tables. No module imports torch before a command runs, so that ``--help`` is fast."""

from loopserve.cli.app import main

__all__ = ["main"]
