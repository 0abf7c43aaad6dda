"""Every policy that comes with loopserve, and that of the plugin beside it, keeps every promise of the kit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from loopserve_keydiff import BareKeyDiffDecode

from loopserve.core.interfaces import Retention
from loopserve.core.registry import Kind
from loopserve.testing import parametrize_with_policy_checks
from loopserve.testing.recorded import held
from loopserve.testing.subject import Subject
from tests.policies.small import COMPRESSORS, POLICIES, built, registered, small, spec

JUMPING = small(
    registered().get(Kind.DECODE, "loopserve"),
    trigger="drift",
    page_budget=6,
    key_bits=4,
    page=8,
    second_hop="kept",
    drift_threshold=0.95,
)
EVICTING = [
    built(each.kind, spec(each, Retention.EVICT))
    for each in COMPRESSORS
    if Retention.EVICT in each.capabilities.retentions
]


@parametrize_with_policy_checks([*(each.policy for each in POLICIES), BareKeyDiffDecode])
def test_policies_conform(policy: type[Any], check: Callable[[object], None]) -> None:
    check(policy)


@parametrize_with_policy_checks([JUMPING, *EVICTING])
def test_other_options_conform(policy: Any, check: Callable[[object], None]) -> None:
    check(policy)


def test_the_jumping_options_drift_while_they_are_looked_at() -> None:
    assert held(Subject(JUMPING)).record.counters["drift"] > 0
