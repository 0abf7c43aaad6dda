"""Run every check that applies to a policy: in one call, as pytest parameters, or as a table.

``check_policy`` raises one error that lists what failed; ``parametrize_with_policy_checks`` makes one test of each check;
``loopserve policies check`` prints the table. Needs no pytest except for the decorator.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from loopserve.core.errors import ConfigError, did_you_mean
from loopserve.core.policy.interfaces import PrefillSparsifier
from loopserve.core.policy.registry import Kind
from loopserve.testing.checks import CHECKS
from loopserve.testing.extra import require
from loopserve.testing.subject import AnyPolicy, AnyPolicyClass, Check, NotApplicable, NotConforming, Outcome, Subject


@dataclass(frozen=True)
class Result:
    """Hold how one check ended, and why it failed or was skipped."""

    check: Check
    outcome: Outcome
    reason: str = ""


def checks_for(policy: AnyPolicy | AnyPolicyClass | Subject) -> list[Check]:
    """Return the checks that apply to a policy of this kind, in the order in which they are run."""
    subject = Subject(policy)
    return [check for check in CHECKS if check.applies_to(subject)]


def report_on(policy: AnyPolicy | AnyPolicyClass | Subject) -> list[Result]:
    """Return the result of every check; no failure is raised. A class is tested under small options, an object as it is.

    Raises ConfigError for an object that is no policy, or for a class that cannot be made under any options known to
    the kit.
    """
    subject = Subject(policy)
    return [_result(check, subject) for check in checks_for(subject)]


def _result(check: Check, subject: Subject) -> Result:
    try:
        check(subject)
    except NotApplicable as reason:
        return Result(check, Outcome.SKIPPED, str(reason))
    except AssertionError as broken:
        return Result(check, Outcome.FAILED, " ".join(str(broken).split()) or "an assertion without a message")
    except Exception as error:  # the policy is foreign code: any error that it raises is a finding
        return Result(check, Outcome.FAILED, f"raised {type(error).__name__}: {' '.join(str(error).split())}")
    return Result(check, Outcome.OK)


def check_policy(
    policy: AnyPolicy | AnyPolicyClass, *, expected_failures: Mapping[str, str] | None = None
) -> list[Result]:
    """Run every check that applies. Raises NotConforming with all failures; otherwise returns the results.

    expected_failures: reason by check name, or by ``policy_name.check_name``. A check that is expected to fail and does
    not is a failure as well.
    """
    expected = _known(expected_failures)
    results = report_on(policy)
    wrong = []
    for each in results:
        reason = _excuse(policy, each.check, expected)
        if each.outcome is Outcome.FAILED and reason is None:
            wrong.append(f"{each.check.name}: {each.reason}")
        elif each.outcome is not Outcome.FAILED and reason is not None:
            wrong.append(f"{each.check.name}: {_unneeded(each.outcome, reason)}")
    if wrong:
        name = getattr(policy, "name", None) or repr(policy)
        raise NotConforming("\n".join([f"policy {name!r} fails {len(wrong)} of {len(results)} checks", *wrong]))
    return results


def failures(results: Iterable[Result]) -> list[Result]:
    """Return the results that failed."""
    return [each for each in results if each.outcome is Outcome.FAILED]


def parametrize_with_policy_checks(
    policies: Iterable[AnyPolicy | AnyPolicyClass], *, expected_failures: Mapping[str, str] | None = None
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make one pytest case per policy and check, for a function that takes ``policy`` and ``check``::

        @parametrize_with_policy_checks([MyCompressor])
        def test_my_policy_conforms(policy, check):
            check(policy)

    expected_failures: reason by check name, or by ``policy_name.check_name`` for one policy only. Such a test is
    reported as an expected failure, and fails if the check does not. Raises MissingExtra without pytest.
    """
    pytest = require("pytest", "the decorator parametrize_with_policy_checks")
    expected = _known(expected_failures)
    parameters = []
    for policy in policies:
        subject = Subject(policy)
        for check in checks_for(subject):
            call = _as_test(check, subject, _excuse(policy, check, expected))
            parameters.append(pytest.param(policy, call, id=f"{kind_of(subject)}-{_label(policy)}-{check.name}"))
    made: Callable[[Callable[..., Any]], Callable[..., Any]] = pytest.mark.parametrize(("policy", "check"), parameters)
    return made


def _as_test(check: Check, subject: Subject, reason: str | None) -> Callable[[object], None]:
    """Return the check as a test function. reason: why it is expected to fail."""
    pytest = require("pytest", "the decorator parametrize_with_policy_checks")

    def call(policy: object = None) -> None:
        try:
            check(subject)
        except NotApplicable as skipped:
            if reason is not None:
                pytest.fail(_unneeded(Outcome.SKIPPED, reason))
            pytest.skip(str(skipped))
        except Exception:
            if reason is None:
                raise
            pytest.xfail(reason)
        if reason is not None:
            pytest.fail(_unneeded(Outcome.OK, reason))

    return call


def kind_of(subject: Subject) -> Kind:
    return Kind.PREFILL if subject.kind is PrefillSparsifier else Kind.DECODE


def _name(policy: AnyPolicy | AnyPolicyClass) -> str:
    return str(getattr(policy, "name", "unnamed"))


def _label(policy: AnyPolicy | AnyPolicyClass) -> str:
    """Return the policy's name, and of an object the options that differ from the defaults."""
    if inspect.isclass(policy):
        return _name(policy)
    fields = type(policy.config).model_fields
    options = {name: getattr(policy.config, name) for name in fields}
    changed = [
        f"{name}={_name(value) if hasattr(value, 'config') else value}"
        for name, value in options.items()
        if value != fields[name].default
    ]
    return f"{_name(policy)}({','.join(changed)})" if changed else _name(policy)


def _excuse(policy: AnyPolicy | AnyPolicyClass, check: Check, expected: Mapping[str, str]) -> str | None:
    return expected.get(f"{_name(policy)}.{check.name}", expected.get(check.name))


def _unneeded(outcome: Outcome, reason: str) -> str:
    return f"ends {outcome}, though it is expected to fail ({reason})"


def _known(expected: Mapping[str, str] | None) -> Mapping[str, str]:
    """Return the expected failures. Raises ConfigError for an unknown check, since a misspelt name would excuse nothing."""
    names = {check.name for check in CHECKS}
    for name in expected or {}:
        if name.rpartition(".")[2] not in names:
            raise ConfigError(f"expected_failures: unknown check {name!r}{did_you_mean(name, names)}")
    return expected or {}
