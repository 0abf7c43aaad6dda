"""The greedy of fixed rounds against the line-by-line one, interpreted. Started by ``test_interpreted``."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from loopserve.kernels import backend
from loopserve.kernels.select_lines import LineSelection, select_lines
from tests.kernels.test_select_lines import cost, covered, rows_of_heads

assert os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture(autouse=True, scope="module")
def large_steps() -> Iterator[None]:
    """The interpreter pays per step, not per number."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("loopserve.kernels.gpu.lines._LINES", 256)
        patch.setattr("loopserve.kernels.gpu.lines._ROWS", 64)
        yield


def selected(implementation: str, probabilities: Tensor, columns: Tensor, new: int, **options: object) -> LineSelection:
    with backend.use(implementation):
        return select_lines(probabilities, columns, new, **options)  # type: ignore[arg-type]


def assert_coverage(selection: LineSelection, probabilities: Tensor, columns: Tensor, alpha: float) -> None:
    """Coverage is what the mask says, and at least what was asked for."""
    rows = covered(selection, probabilities, columns)
    torch.testing.assert_close(selection.coverage, rows.mean(1), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(selection.row_coverage, rows, atol=1e-4, rtol=1e-4)
    assert (selection.coverage >= alpha - 1e-4).all()


@pytest.mark.parametrize(("cost_of", "new", "total"), [("length", 60, 60), ("length", 128, 300), ("tile", 100, 200)])
def test_it_costs_at_most_two_percent_more(cost_of: str, new: int, total: int) -> None:
    probabilities, columns = rows_of_heads(new, total, 32, seed=1)
    slow = selected("reference", probabilities, columns, new, alpha=0.9, cost=cost_of)
    fast = selected("triton", probabilities, columns, new, alpha=0.9, cost=cost_of)
    assert_coverage(fast, probabilities, columns, 0.9)
    assert fast.cost.sum() <= 1.02 * slow.cost.sum()
    torch.testing.assert_close(fast.cost, cost(fast, new, cost_of))


def test_too_few_rounds_still_reach_the_target(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loopserve.kernels.gpu.select_lines.ROUNDS", 1)
    for new, total in [(1, 1), (1, 40), (63, 111)]:
        probabilities, columns = rows_of_heads(new, total, 16, seed=new)
        for alpha in (0.0, 0.7, 1.0):
            assert_coverage(selected("triton", probabilities, columns, new, alpha=alpha), probabilities, columns, alpha)


def test_forced_lines_are_in_and_count() -> None:
    probabilities, columns = rows_of_heads(50, 80, 16, 1)
    probabilities = probabilities[2:4]
    forced = torch.zeros(2, 80, dtype=torch.bool)
    forced[:, [3, 40]] = True
    options = {"forced_verticals": forced, "forced_slashes": forced}
    nothing_else = selected("triton", probabilities, columns, 50, alpha=0.0, **options)
    assert torch.equal(nothing_else.verticals, forced) and torch.equal(nothing_else.slashes, forced)
    more = selected("triton", probabilities, columns, 50, alpha=0.9, **options)
    assert_coverage(more, probabilities, columns, 0.9)
    assert (more.verticals & forced).equal(forced)


def test_heavy_rows_are_served_first() -> None:
    probabilities, columns = rows_of_heads(100, 200, 32, 0)
    probabilities = probabilities[-1:]  # the diffuse head has to choose whom to serve
    weights = torch.ones(32)
    weights[5] = 200.0
    plain = selected("triton", probabilities, columns, 100, alpha=0.7)
    heavy = selected("triton", probabilities, columns, 100, alpha=0.7, row_weights=weights)
    gained = covered(heavy, probabilities, columns)[:, 5] - covered(plain, probabilities, columns)[:, 5]
    assert gained[0] > 0.05


def test_rows_that_attend_to_nothing_ask_for_nothing() -> None:
    selection = selected("triton", torch.zeros(2, 3, 9), torch.tensor([4, 6, 8]), 5, alpha=0.9)
    assert not selection.verticals.any() and not selection.slashes.any() and (selection.coverage == 1).all()


def test_a_floor_per_row_goes_to_what_can_serve_it() -> None:
    probabilities, columns = rows_of_heads(20, 40, 8, 0)
    floored = selected("triton", probabilities, columns, 20, alpha=0.5, row_floor=0.85)
    assert covered(floored, probabilities, columns).min() >= 0.85 - 1e-4


@pytest.mark.parametrize(("cost_of", "new", "total"), [("length", 64, 150), ("tile", 100, 200)])
def test_lines_below_the_least_weight_are_left_out(cost_of: str, new: int, total: int) -> None:
    probabilities, columns = rows_of_heads(new, total, 32, seed=1)
    options = {"alpha": 0.999, "cost": cost_of, "least_weight": 0.002}
    slow = selected("reference", probabilities, columns, new, **options)
    fast = selected("triton", probabilities, columns, new, **options)
    assert (slow.coverage < 0.99).any()
    assert_coverage(fast, probabilities, columns, 0.0)
    assert (fast.coverage >= slow.coverage - 0.02).all()
    assert fast.cost.sum() <= 1.03 * slow.cost.sum()


def test_too_few_rounds_take_no_line_below_the_least_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loopserve.kernels.gpu.select_lines.ROUNDS", 1)
    probabilities, columns = rows_of_heads(63, 111, 16, seed=1)
    options = {"alpha": 0.999, "least_weight": 0.004}
    slow = selected("reference", probabilities, columns, 63, **options)
    fast = selected("triton", probabilities, columns, 63, **options)
    assert_coverage(fast, probabilities, columns, 0.0)
    assert (fast.coverage <= slow.coverage + 0.02).all() and (fast.coverage > 0.5 * slow.coverage).all()
