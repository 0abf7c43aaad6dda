"""Decode budgets set from outside, so that stacks attend to equally many pairs and their answers compare."""

from __future__ import annotations

from typing import Any

from loopserve.api import load_stack
from loopserve.core.stack.stack import PolicyStack

_LEAST = 16


def budget_for(share: float, length: float, answer_room: float) -> int:
    """Pairs per KV head so that ``share`` of what dense attends to is attended, over conversations ``length`` tokens long.

    answer_room: outputs attended besides the budget, on average over an answer.
    """
    return max(_LEAST, round(length * share - answer_room))


def room_for(stack: PolicyStack, outputs: float) -> float:
    """Of so many outputs attended on average over an answer, those that the stack's budget does not count in."""
    return 0.0 if stack.decode.counts_outputs else outputs


def budget_of(stack: PolicyStack) -> int | None:
    """The decode budget of a stack; None where its decode policy has none."""
    found = innermost(stack.describe()["decode"]).get("budget")
    return found if isinstance(found, int) else None


def with_budget(stack: PolicyStack, budget: int) -> PolicyStack:
    """The stack with another decode budget in every layer that has one; others stay as they are. ConfigError if a policy cannot work
    with it.
    """
    described = stack.describe()
    for each in [described, *described.get("layers", [])]:
        decode = innermost(each.get("decode") or {})
        if "budget" in decode:
            # What a policy sets aside of its budget, or filters before it, stays the same share of it.
            for part in ("page_budget", "filter_budget"):
                if part in decode:
                    decode[part] = decode[part] * budget // decode["budget"]
            if decode.get("page_budget"):  # a small budget must leave something to select
                forced = decode.get("sink_tokens", 0) + decode.get("recent_window", 0)
                decode["page_budget"] = max(1, min(decode["page_budget"], budget - forced - 1))
            decode["budget"] = budget
    return load_stack(described)


def innermost(decode: dict[str, Any]) -> dict[str, Any]:
    """What a described decode policy wraps at last, where budgets stand; itself if it wraps nothing."""
    while isinstance(decode.get("inner"), dict):
        decode = decode["inner"]
    return decode
