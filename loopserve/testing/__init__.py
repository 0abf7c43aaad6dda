"""Offer public test tools, for our tests and for plugin authors.

The conformance kit: ``check_policy``, ``report_on``, ``parametrize_with_policy_checks``. Inputs: ``make_inputs``,
``ScriptedConversation``, and, for hypothesis, ``attention_inputs``, ``patterns``, ``selections``. The contract of a
call: ``assert_pattern``, ``assert_selection``, ``unchanged``. Names are loaded at first use. Only the names that need
them load hypothesis and pytest, which ``loopserve[testing]`` installs.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loopserve.testing.assertions import assert_pattern, assert_selection, unchanged
    from loopserve.testing.extra import MissingExtra
    from loopserve.testing.inputs import make_inputs
    from loopserve.testing.kit import Result, check_policy, checks_for, parametrize_with_policy_checks, report_on
    from loopserve.testing.scripted import ScriptedConversation
    from loopserve.testing.strategies import attention_inputs, patterns, selections
    from loopserve.testing.subject import NotApplicable, NotConforming, Outcome

_MODULES = {
    "MissingExtra": "extra",
    "NotApplicable": "subject",
    "NotConforming": "subject",
    "Outcome": "subject",
    "Result": "kit",
    "ScriptedConversation": "scripted",
    "assert_pattern": "assertions",
    "assert_selection": "assertions",
    "attention_inputs": "strategies",
    "check_policy": "kit",
    "checks_for": "kit",
    "make_inputs": "inputs",
    "parametrize_with_policy_checks": "kit",
    "patterns": "strategies",
    "report_on": "kit",
    "selections": "strategies",
    "unchanged": "assertions",
}
__all__ = [
    "MissingExtra",
    "NotApplicable",
    "NotConforming",
    "Outcome",
    "Result",
    "ScriptedConversation",
    "assert_pattern",
    "assert_selection",
    "attention_inputs",
    "check_policy",
    "checks_for",
    "make_inputs",
    "parametrize_with_policy_checks",
    "patterns",
    "report_on",
    "selections",
    "unchanged",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
