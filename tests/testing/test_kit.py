"""The doors of the kit: one error for all failures, expected failures, what is no policy, what is not installed."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import Field

from loopserve.core.errors import ConfigError
from loopserve.core.policy.base import PolicyConfig
from loopserve.testing import (
    MissingExtra,
    NotConforming,
    Outcome,
    check_policy,
    checks_for,
    parametrize_with_policy_checks,
    report_on,
)
from loopserve.testing.extra import require
from tests.testing.broken_selections import LastFirst, SparesFive
from tests.testing.honest import EveryOtherKey, LargestKeys

pytest_plugins = ["pytester"]

SORTED, EXACT = "selections_are_sorted", "budget_is_exact"


class BothFaults(SparesFive, LastFirst):
    """Keeps five pairs fewer than its budget, the last position first."""

    def given(self, *given: Any) -> Any:
        return LastFirst.given(self, SparesFive.given(self, *given), given[1])


def test_check_policy_names_all_that_failed_and_nothing_else() -> None:
    with pytest.raises(NotConforming, match="policy 'both_faults' fails 2 of") as raised:
        check_policy(BothFaults)
    lines = str(raised.value).splitlines()
    assert [line.split(":")[0] for line in lines[1:]] == [SORTED, EXACT]
    assert "pairs attended, the budget is 24" in lines[2]


def test_check_policy_returns_every_result() -> None:
    results = check_policy(LargestKeys)
    assert [each.check for each in results] == checks_for(LargestKeys)
    assert 25 <= len(results) <= 40


def test_expected_failures_need_to_be_what_they_say() -> None:
    check_policy(LastFirst, expected_failures={SORTED: "by design"})
    check_policy(
        LastFirst, expected_failures={f"last_first.{SORTED}": "by design", "other.budget_is_exact": "no matter"}
    )
    with pytest.raises(NotConforming, match=r"budget_is_exact: ends ok, though it is expected to fail \(wrongly\)"):
        check_policy(LastFirst, expected_failures={SORTED: "by design", EXACT: "wrongly"})
    with pytest.raises(ConfigError, match="unknown check 'selections_are_sortd'; did you mean 'selections_are_sorted'"):
        check_policy(LastFirst, expected_failures={"selections_are_sortd": "a slip"})


class RaisesLater(EveryOtherKey):
    """Fails in its second turn."""

    def mask(self, inputs: Any) -> Any:
        if inputs.turn:
            raise KeyError("turn one")
        return super().mask(inputs)


def test_what_a_policy_raises_is_a_finding() -> None:
    failed = {each.check.name: each.reason for each in report_on(RaisesLater) if each.outcome is Outcome.FAILED}
    assert failed["history_is_accepted"] == "raised KeyError: 'turn one'"
    assert "pattern_is_causal" not in failed


class NeedsAnOption(EveryOtherKey):
    """Has an option without a default."""

    class Config(EveryOtherKey.Config):
        path: str = Field(description="A file.")


class CannotBeMade(EveryOtherKey):
    """Raises when it is made."""

    def __init__(self, config: PolicyConfig | None = None) -> None:
        raise RuntimeError("not today")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (3, "3 is no policy: give a class or an object of one"),
        (NeedsAnOption, "give the check an object instead of the class"),
        (CannotBeMade, "CannotBeMade cannot be made: RuntimeError: not today"),
    ],
)
def test_what_cannot_be_checked_is_said_in_one_line(wrong: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_policy(wrong)


def test_an_object_is_tried_as_it_is() -> None:
    small = LargestKeys(LargestKeys.Config(budget=20, sink_tokens=0, recent_window=3))
    skipped = {each.check.name for each in check_policy(small) if each.outcome is Outcome.SKIPPED}
    assert "sinks_are_kept" in skipped and "recent_window_is_kept" not in skipped
    made = NeedsAnOption(NeedsAnOption.Config(path="here"))
    assert check_policy(made)


def test_the_decorator_makes_one_test_of_each_check(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        from loopserve.testing import parametrize_with_policy_checks
        from tests.testing.broken_selections import LastFirst

        @parametrize_with_policy_checks([LastFirst], expected_failures={"selections_are_sorted": "by design"})
        def test_declared(policy, check):
            assert policy is LastFirst
            check(policy)

        @parametrize_with_policy_checks([LastFirst], expected_failures={"budget_is_exact": "wrongly"})
        def test_undeclared(policy, check):
            check(policy)
        """
    )
    ended = pytester.runpytest_inprocess("-p", "no:cacheprovider", "-p", "no:xdist", "-rfxs")
    checks = len(checks_for(LastFirst))
    counts = ended.parseoutcomes()
    assert counts["xfailed"] == 1 and counts["failed"] == 2
    assert sum(counts.values()) - counts.get("warnings", 0) == 2 * checks
    ended.stdout.fnmatch_lines_random(
        [
            "XFAIL*test_declared*decode-last_first-selections_are_sorted*by design*",
            "FAILED*test_undeclared*decode-last_first-selections_are_sorted*",
            "E*Failed: ends ok, though it is expected to fail (wrongly)",
            "FAILED*test_undeclared*decode-last_first-budget_is_exact*",
        ]
    )


def test_a_missing_extra_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("hypothesis", "pytest"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "loopserve.testing.strategies", raising=False)
    install = "which is not installed: pip install 'loopserve[testing]'"
    with pytest.raises(MissingExtra) as raised:
        exec("from loopserve.testing import attention_inputs", {})
    assert str(raised.value) == f"loopserve.testing.strategies needs hypothesis, {install}"
    with pytest.raises(MissingExtra) as raised:
        parametrize_with_policy_checks([])
    assert str(raised.value) == f"the decorator parametrize_with_policy_checks needs pytest, {install}"
    check_policy(LargestKeys)


def test_a_package_that_is_there_but_broken_is_not_called_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "half_installed.py").write_text("import not_there_at_all")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModuleNotFoundError, match="not_there_at_all") as raised:
        require("half_installed", "this test")
    assert not isinstance(raised.value, MissingExtra)


def test_optimised_python_cannot_pass_by_leaving_assertions_out() -> None:
    program = (
        "from loopserve.testing import check_policy\n"
        "from loopserve.policies.decode.full import FullDecode\ncheck_policy(FullDecode)"
    )
    ended = subprocess.run([sys.executable, "-O", "-c", program], capture_output=True, text=True, check=False)
    assert ended.returncode == 1 and "run without -O" in ended.stderr.splitlines()[-1]


def test_the_examples_of_the_documentation_run() -> None:
    text = (Path(__file__).parents[2] / "docs" / "conformance.md").read_text("utf-8")
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(block, names)
    assert len(names["results"]) == len(checks_for(names["SnapKVDecode"]))
    names["test_one_score_for_each_pair"]()
