"""Every policy that comes with loopserve, and that of the plugin beside it, keeps every promise of the kit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from loopserve_keydiff import BareKeyDiffDecode

from loopserve.core.kv.selection import Retention
from loopserve.core.policy.registry import Kind
from loopserve.testing import parametrize_with_policy_checks
from loopserve.testing.scripted import held
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


@pytest.fixture(autouse=True)
def _the_gpu_has_tests_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """``tests/gpu/test_conformance.py`` asks what only a GPU can tell; the rest is the same on every machine."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@parametrize_with_policy_checks([*(each.policy for each in POLICIES), BareKeyDiffDecode])
def test_policies_conform(policy: type[Any], check: Callable[[object], None]) -> None:
    check(policy)


@parametrize_with_policy_checks([JUMPING, *EVICTING])
def test_other_options_conform(policy: Any, check: Callable[[object], None]) -> None:
    check(policy)


def test_the_jumping_options_drift_while_they_are_looked_at() -> None:
    assert held(Subject(JUMPING)).record.counters["drift"] > 0
