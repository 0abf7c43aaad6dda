"""Implement Star Attention as a loopserve plugin with its own pattern and kernels."""

from __future__ import annotations

from loopserve import Registry, hookimpl
from loopserve_star.pattern import StarPattern
from loopserve_star.policy import StarPrefill

LOOPSERVE_API = (1, 0)

__all__ = ["StarPattern", "StarPrefill", "loopserve_register_policies"]


@hookimpl
def loopserve_register_policies(registry: Registry) -> None:
    registry.register(StarPrefill)
