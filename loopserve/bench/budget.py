"""Set decode budgets so that all stacks attend to the same number of KV pairs."""

from __future__ import annotations

from typing import Any

from loopserve.api import load_stack
from loopserve.core.stack.stack import PolicyStack

_LEAST = 16


def budget_for(share: float, length: float, uncounted_outputs: float) -> int:
    """Return the pairs per KV head so that ``share`` of the pairs that dense attention attends to are attended.

    length: mean conversation length in tokens. uncounted_outputs: outputs attended besides the budget, mean over an
    answer.
    """
    return max(_LEAST, round(length * share - uncounted_outputs))


def uncounted_outputs_of(stack: PolicyStack, outputs: float) -> float:
    """Return how many of the attended outputs are not counted in the stack's budget."""
    return 0.0 if stack.decode.counts_outputs else outputs


def budget_of(stack: PolicyStack) -> int | None:
    """Return the decode budget of a stack, or None if its decode policy has none."""
    found = innermost(stack.describe()["decode"]).get("budget")
    return found if isinstance(found, int) else None


def with_budget(stack: PolicyStack, budget: int) -> PolicyStack:
    """Return the stack with another decode budget in every layer that has one.

    Layers without a budget stay as they are. Raises ConfigError if a policy cannot work with the budget.
    """
    described = stack.describe()
    for each in [described, *described.get("layers", [])]:
        decode = innermost(each.get("decode") or {})
        if "budget" in decode:
            # A part reserved from the budget, or a filter before it, keeps its share of the budget.
            for part in ("page_budget", "filter_budget"):
                if part in decode:
                    decode[part] = decode[part] * budget // decode["budget"]
            if decode.get("page_budget"):  # a small budget must leave something to select
                forced = decode.get("sink_tokens", 0) + decode.get("recent_window", 0)
                decode["page_budget"] = max(1, min(decode["page_budget"], budget - forced - 1))
            decode["budget"] = budget
    return load_stack(described)


def innermost(decode: dict[str, Any]) -> dict[str, Any]:
    """Return the innermost description of a wrapped decode policy, where the budget is set."""
    while isinstance(decode.get("inner"), dict):
        decode = decode["inner"]
    return decode
