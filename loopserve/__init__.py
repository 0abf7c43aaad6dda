"""Long multi-turn conversations, faster: pluggable sparse prefill and KV selection for transformers models.

Public names are loaded when first used, so that ``import loopserve`` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loopserve.api import ChatSession, Engine, Reply, apply, load_stack
    from loopserve.core.errors import LoopServeError
    from loopserve.core.hookspecs import hookimpl

__version__ = "0.1.0"
_HOMES = {
    "ChatSession": "loopserve.api",
    "Engine": "loopserve.api",
    "LoopServeError": "loopserve.core.errors",
    "Reply": "loopserve.api",
    "apply": "loopserve.api",
    "hookimpl": "loopserve.core.hookspecs",
    "load_stack": "loopserve.api",
}
__all__ = ["ChatSession", "Engine", "LoopServeError", "Reply", "__version__", "apply", "hookimpl", "load_stack"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'loopserve' has no attribute {name!r}")
