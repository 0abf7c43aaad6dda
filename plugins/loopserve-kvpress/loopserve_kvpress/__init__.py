"""Run scorers with kvpress's interface (a method ``score``), unchanged, as loopserve decode policies."""

from __future__ import annotations

from loopserve import Registry, hookimpl
from loopserve_kvpress.policy import KVPressDecode, ScorerDecode
from loopserve_kvpress.scorers import Scorer

LOOPSERVE_API = (1, 0)

__all__ = ["KVPressDecode", "Scorer", "ScorerDecode", "loopserve_register_policies"]


@hookimpl
def loopserve_register_policies(registry: Registry) -> None:
    registry.register(KVPressDecode)
