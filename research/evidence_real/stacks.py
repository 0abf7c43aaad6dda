"""Read stacks from the command line, and size their budgets."""

from __future__ import annotations

from typing import Any

from loopserve.api import load_stack
from loopserve.bench.budget import budget_for, innermost, uncounted_outputs_of, with_budget
from loopserve.core.stack.stack import PolicyStack


def at_share(stack: PolicyStack, share: float, tokens: int, forced: int) -> PolicyStack:
    """Return the stack with the budget at which its decoding attends to about ``share`` of the pairs. ``dense_below`` is off."""
    length = tokens + forced / 2
    budgeted = with_budget(stack, budget_for(share, length, uncounted_outputs_of(stack, forced / 2)))
    described = budgeted.describe()
    for each in [described, *described.get("layers", [])]:
        decode = innermost(each.get("decode") or {})
        if "dense_below" in decode:
            decode["dense_below"] = 1
    return load_stack(described)


def with_options(spec: str) -> PolicyStack:
    """Return the stack of ``NAME`` or ``NAME:option=value,...``; see the module."""
    name, _, changes = spec.partition(":")
    stack = load_stack(name)
    if not changes:
        return stack
    described = stack.describe()
    for change in changes.split(","):
        option, _, value = change.partition("=")
        part, _, key = option.rpartition(".")
        target = innermost(described["decode"]) if part in ("", "decode") else described[part]
        target[key] = _plain(value)
    described["name"] = spec
    return load_stack(described)


def _plain(value: str) -> Any:
    for read in (int, float):
        try:
            return read(value)
        except ValueError:
            pass
    return {"true": True, "false": False}.get(value, value)
