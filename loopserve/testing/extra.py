"""Import pytest and hypothesis, which come with ``loopserve[testing]``, not with loopserve."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from loopserve.core.errors import LoopServeError


class MissingExtra(LoopServeError, ImportError):
    """Report that a package which the test tools need is not installed."""


def require(name: str, what: str) -> Any:
    """Return the imported module ``name``. Raises MissingExtra with the purpose and the command to install it."""
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise MissingExtra(f"{what} needs {name}, which is not installed: pip install 'loopserve[testing]'") from None
