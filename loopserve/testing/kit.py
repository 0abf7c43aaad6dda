"""The conformance kit: every check that applies to a policy, in one call, as pytest parameters, or as a table.

``check_policy`` raises one error that lists what failed; ``parametrize_with_policy_checks`` makes one test of each check;
``loopserve policies check`` prints the table. Needs no pytest except for the decorator.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from loopserve.core.errors import ConfigError, did_you_mean
from loopserve.testing.checks import CHECKS
from loopserve.testing.subject import Check, NotApplicable, NotConforming, Outcome, Subject
from loopserve.testing.variants import AnyPolicy, AnyPolicyClass


@dataclass(frozen=True)
class Result:
    """How one check ended, and why it failed or did not apply."""

    check: Check
    outcome: Outcome
    reason: str = ""


def checks_for(policy: AnyPolicy | AnyPolicyClass) -> list[Check]:
    """The checks that are asked of a policy of this kind."""
    subject = Subject(policy)
    return [check for check in CHECKS if check.applies_to(subject)]


def report_on(policy: AnyPolicy | AnyPolicyClass, checks: Iterable[Check] | None = None) -> list[Result]:
    """The result of every check; nothing is raised. A class is tried under small options, an object as it is."""
    subject = Subject(policy)
    return [_result(check, subject) for check in (checks_for(policy) if checks is None else checks)]


def _result(check: Check, subject: Subject) -> Result:
    try:
        check(subject)
    except NotApplicable as reason:
        return Result(check, Outcome.NOT_APPLICABLE, str(reason))
    except AssertionError as broken:
        return Result(check, Outcome.FAILED, str(broken))
    except Exception as error:  # the policy is somebody else's code: whatever it raises is a finding
        return Result(check, Outcome.FAILED, f"raised {type(error).__name__}: {' '.join(str(error).split())}")
    return Result(check, Outcome.PASSED)


def check_policy(
    policy: AnyPolicy | AnyPolicyClass, *, expected_failures: Mapping[str, str] | None = None
) -> list[Result]:
    """Run every check that applies. NotConforming lists all that failed; otherwise the results are returned.

    expected_failures: reason by check name. A check that is expected to fail and does not is a failure as well.
    """
    expected = _known(expected_failures or {})
    results = report_on(policy)
    wrong = [f"{each.check.name}: {each.reason}" for each in failures(results) if each.check.name not in expected]
    passed = [each.check.name for each in results if each.outcome is Outcome.PASSED]
    wrong += [
        f"{name}: passes, though it is expected to fail ({expected[name]})" for name in passed if name in expected
    ]
    if wrong:
        name = getattr(policy, "name", None) or repr(policy)
        raise NotConforming("\n".join([f"policy {name!r} fails {len(wrong)} of {len(results)} checks", *wrong]))
    return results


def failures(results: Iterable[Result]) -> list[Result]:
    return [each for each in results if each.outcome is Outcome.FAILED]


def parametrize_with_policy_checks(
    policies: Iterable[AnyPolicy | AnyPolicyClass], *, expected_failures: Mapping[str, str] | None = None
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A pytest decorator: one test per policy and check, for a function that takes ``policy`` and ``check``.

    expected_failures: reason by check name, or by ``policy_name.check_name`` for one policy only; such a test must fail.
    """
    import pytest

    expected = _known(expected_failures or {})
    parameters = []
    for policy in policies:
        for check in checks_for(policy):
            reason = expected.get(f"{policy.name}.{check.name}", expected.get(check.name))
            marks = [pytest.mark.xfail(reason=reason, strict=True)] if reason is not None else []
            label = f"{_kind(policy)}-{policy.name}-{check.name}"
            parameters.append(pytest.param(policy, _skipping(check), marks=marks, id=label))
    made: Callable[[Callable[..., Any]], Callable[..., Any]] = pytest.mark.parametrize(("policy", "check"), parameters)
    return made


def _skipping(check: Check) -> Callable[[AnyPolicy | AnyPolicyClass], None]:
    import pytest

    def call(policy: AnyPolicy | AnyPolicyClass) -> None:
        try:
            check(policy)
        except NotApplicable as reason:
            pytest.skip(f"not applicable: {reason}")

    return call


def _kind(policy: AnyPolicy | AnyPolicyClass) -> str:
    base = policy if inspect.isclass(policy) else type(policy)
    return "prefill" if hasattr(base, "sparsify") else "decode"


def _known(expected: Mapping[str, str]) -> Mapping[str, str]:
    """The same. ConfigError for the name of no check, since a misspelt one would excuse nothing."""
    names = {check.name for check in CHECKS}
    for name in expected:
        if name.rpartition(".")[2] not in names:
            raise ConfigError(f"expected_failures: unknown check {name!r}{did_you_mean(name, names)}")
    return expected
