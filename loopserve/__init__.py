"""Serve long multi-turn conversations faster: pluggable sparse prefill and KV selection for transformers models.

Everything that applications and policy plugins need is a name of this package. A name is loaded when it is first used, so that
``import loopserve`` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loopserve.api import Engine, apply, load_stack
    from loopserve.chat_session import ChatSession, Reply
    from loopserve.core.errors import ConfigError, InputError, LoopServeError, ModelError, PolicyError, PolicyFault
    from loopserve.core.kv.selection import KVSelection, Retention
    from loopserve.core.policy.base import API_VERSION, Capabilities, PolicyConfig
    from loopserve.core.policy.hookspecs import hookimpl
    from loopserve.core.policy.interfaces import (
        AttentionInputs,
        DecodeCompressor,
        Observation,
        Phase,
        PrefillSparsifier,
        Record,
        Selections,
        Step,
    )
    from loopserve.core.policy.layers import LayerParts, LayerSpec, LayerType, Need
    from loopserve.core.policy.patterns import AttentionPattern, BlockPattern, DensePattern, LinePattern
    from loopserve.core.policy.registry import Registry
    from loopserve.core.policy.scoring import ScoredCompressor, ScoredConfig, ScoredState
    from loopserve.core.policy.wrappers import ScoredWrapper, WrapperConfig
    from loopserve.core.stack.stack import PolicyStack

__version__ = "0.1.0"
_NAMES = {
    "loopserve.api": ("Engine", "apply", "load_stack"),
    "loopserve.chat_session": ("ChatSession", "Reply"),
    "loopserve.core.errors": (
        "ConfigError",
        "InputError",
        "LoopServeError",
        "ModelError",
        "PolicyError",
        "PolicyFault",
    ),
    "loopserve.core.kv.selection": ("KVSelection", "Retention"),
    "loopserve.core.policy.base": ("API_VERSION", "Capabilities", "PolicyConfig"),
    "loopserve.core.policy.hookspecs": ("hookimpl",),
    "loopserve.core.policy.interfaces": (
        "AttentionInputs",
        "DecodeCompressor",
        "Observation",
        "Phase",
        "PrefillSparsifier",
        "Record",
        "Selections",
        "Step",
    ),
    "loopserve.core.policy.layers": ("LayerParts", "LayerSpec", "LayerType", "Need"),
    "loopserve.core.policy.patterns": ("AttentionPattern", "BlockPattern", "DensePattern", "LinePattern"),
    "loopserve.core.policy.registry": ("Registry",),
    "loopserve.core.policy.scoring": ("ScoredCompressor", "ScoredConfig", "ScoredState"),
    "loopserve.core.policy.wrappers": ("ScoredWrapper", "WrapperConfig"),
    "loopserve.core.stack.stack": ("PolicyStack",),
}
_HOMES = {name: module for module, names in _NAMES.items() for name in names}
__all__ = [
    "API_VERSION",
    "AttentionInputs",
    "AttentionPattern",
    "BlockPattern",
    "Capabilities",
    "ChatSession",
    "ConfigError",
    "DecodeCompressor",
    "DensePattern",
    "Engine",
    "InputError",
    "KVSelection",
    "LayerParts",
    "LayerSpec",
    "LayerType",
    "LinePattern",
    "LoopServeError",
    "ModelError",
    "Need",
    "Observation",
    "Phase",
    "PolicyConfig",
    "PolicyError",
    "PolicyFault",
    "PolicyStack",
    "PrefillSparsifier",
    "Record",
    "Registry",
    "Reply",
    "Retention",
    "ScoredCompressor",
    "ScoredConfig",
    "ScoredState",
    "ScoredWrapper",
    "Selections",
    "Step",
    "WrapperConfig",
    "__version__",
    "apply",
    "hookimpl",
    "load_stack",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'loopserve' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
