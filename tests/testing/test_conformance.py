"""Every policy that comes with loopserve, and that of the plugin beside it, keeps every promise of the kit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from loopserve_keydiff import BareKeyDiffDecode

from loopserve.testing import parametrize_with_policy_checks
from tests.policies.small import POLICIES


@parametrize_with_policy_checks([*(each.policy for each in POLICIES), BareKeyDiffDecode])
def test_policies_conform(policy: type[Any], check: Callable[[object], None]) -> None:
    check(policy)
