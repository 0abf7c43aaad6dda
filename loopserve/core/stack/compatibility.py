"""Combine every prefill policy with every decode policy: which pairs work, and why the others are refused."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from loopserve.core.errors import ConfigError
from loopserve.core.policy.interfaces import DecodeCompressor, PrefillSparsifier, Retention
from loopserve.core.policy.registry import Kind, Registration, Registry
from loopserve.core.stack.stack import pair_refusals, resolve_stack

_INNER = "snapkv"  # the policy inside a wrapper that is listed on its own
_NEUTRAL = {Kind.PREFILL: "dense", Kind.DECODE: "full"}


@dataclass(frozen=True)
class Pair:
    """Hold one prefill and one decode policy with default options, the retention, and why they are refused; None = they work."""

    prefill: str
    decode: str
    retention: Retention
    reason: str | None


def pairs(registry: Registry) -> Iterator[Pair]:
    """Return the prefill policies by name, each with every decode policy under every retention."""
    made = {each: _as_it_comes(each, registry) for each in registry}
    for first in (each for each in registry if each.kind is Kind.PREFILL):
        for second in (each for each in registry if each.kind is Kind.DECODE):
            for retention in Retention:
                reason = _reason(made[first], made[second], retention)
                yield Pair(first.name, second.name, retention, reason)


def _as_it_comes(policy: Registration, registry: Registry) -> PrefillSparsifier | DecodeCompressor[Any] | str:
    """Return the policy with default options (a wrapper around another one), or why it cannot be made."""
    written: dict[str, Any] = {"policy": policy.name}
    if "inner" in policy.config.model_fields:
        written["inner"] = {"policy": _INNER}
    spec = {str(kind): {"policy": name} for kind, name in _NEUTRAL.items()} | {str(policy.kind): written}
    try:
        stack = resolve_stack(spec, registry)
    except ConfigError as error:
        return f"cannot be made without options: {error}"
    return stack.prefill if policy.kind is Kind.PREFILL else stack.decode


def _reason(prefill: Any, decode: Any, retention: Retention) -> str | None:
    for made in (prefill, decode):
        if isinstance(made, str):
            return made
    if retention not in decode.effective_capabilities.retentions:
        return f"decode policy {decode.name!r} cannot {retention} pairs"
    return next(iter(pair_refusals(prefill, decode, retention=retention)), None)
