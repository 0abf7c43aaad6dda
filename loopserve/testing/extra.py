"""What only testing needs: pytest and hypothesis come with ``loopserve[testing]``, not with loopserve."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from loopserve.core.errors import LoopServeError


class MissingExtra(LoopServeError, ImportError):
    """A package that the tools for tests need is not installed."""


def require(name: str, what: str) -> Any:
    """The imported module ``name``, or MissingExtra: one line that says what needs it and how to get it."""
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise MissingExtra(f"{what} needs {name}, which is not installed: pip install 'loopserve[testing]'") from None
