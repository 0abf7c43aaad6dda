"""The kit itself is tested: honest policies pass, and each broken one is noticed by one check alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from loopserve.testing.checks import CHECKS
from loopserve.testing.kit import failures, report_on
from loopserve.testing.subject import Outcome
from tests.testing.honest import EveryOtherKey, LargestKeys
from tests.testing.mutations import BROKEN, renewed

NEEDS_A_GPU = "gpu_is_never_waited_for"
SKIPPED_BY_BOTH = {"docstring_gives_the_link", NEEDS_A_GPU, "sparsifier_state_survives_a_fork"}


def test_every_check_has_a_name_of_its_own_and_says_one_sentence() -> None:
    assert len({check.name for check in CHECKS}) == len(CHECKS)
    for check in CHECKS:
        assert check.summary.endswith(".") and ". " not in check.summary, check.name


def test_every_check_has_a_broken_policy() -> None:
    assert {check.name for check in CHECKS} == set(BROKEN)


@pytest.mark.parametrize("policy", [EveryOtherKey, LargestKeys])
def test_an_honest_policy_passes_everything(policy: type[Any]) -> None:
    results = report_on(policy)
    assert not failures(results), failures(results)
    skipped = {each.check.name for each in results if each.outcome is Outcome.SKIPPED}
    assert skipped <= SKIPPED_BY_BOTH


@pytest.mark.parametrize(("name", "policy"), BROKEN.items(), ids=BROKEN)
def test_a_broken_policy_is_noticed_by_its_check_alone(name: str, policy: type[Any]) -> None:
    if name == NEEDS_A_GPU and not torch.cuda.is_available():
        assert not failures(report_on(policy))
        pytest.skip("what it does wrong shows on a GPU only")
    results = report_on(policy)
    assert [each.check.name for each in failures(results)] == [name], failures(results)
    assert all(each.reason for each in results if each.outcome is not Outcome.OK)


def test_the_table_is_up_to_date() -> None:
    text = (Path(__file__).parents[2] / "docs" / "conformance.md").read_text("utf-8")
    assert renewed(text) == text, "run: python -m tests.testing.mutations docs/conformance.md"
