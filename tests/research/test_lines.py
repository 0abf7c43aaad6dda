"""The analyses of lines against plain loops and values by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from loopserve.bench.heads import structured_heads
from loopserve.core.policy.patterns import LinePattern
from research.evidence.lines import chance, fewest_lines, jaccard, row_coverage, softmax_rows, worst_tenth


def rows(new: int, total: int, seed: int) -> Tensor:
    """Softmax rows of a block, ``[new, total]``, heavy-tailed so that lines differ."""
    draw = torch.Generator().manual_seed(seed)
    seen = torch.arange(total) <= torch.arange(total - new, total)[:, None]
    return (torch.randn(new, total, generator=draw) * 3).masked_fill(~seen, float("-inf")).softmax(1)


def plain_greedy(weights: Tensor, alpha: float) -> list[tuple[int, int]]:
    """The heaviest line of what is left, cell by cell: (0, column) or (1, offset)."""
    left, (new, total) = weights.double().clone(), weights.shape
    whole, taken = float(left.sum()), []
    while float(left.sum()) > (1 - alpha) * whole + 1e-9 * whole:
        masses = {(0, column): float(left[:, column].sum()) for column in range(total)}
        for offset in range(total):
            cells = [(row, total - new + row - offset) for row in range(new)]
            masses[1, offset] = sum(float(left[row, column]) for row, column in cells if column >= 0)
        kind, line = max(masses, key=lambda each: (round(masses[each], 9), -each[0], -each[1]))
        taken.append((kind, line))
        for row in range(new):
            column = line if kind == 0 else total - new + row - line
            if column >= 0:
                left[row, column] = 0.0
    return taken


@pytest.mark.parametrize(("new", "total", "seed"), [(5, 5, 0), (7, 12, 1), (12, 12, 2), (4, 20, 3), (1, 6, 4)])
def test_fewest_lines_are_those_of_a_plain_greedy(new: int, total: int, seed: int) -> None:
    weights = rows(new, total, seed)
    for alpha, found in zip((0.6, 0.9), fewest_lines(weights, (0.6, 0.9)), strict=True):
        lines = plain_greedy(weights, alpha)
        expected = torch.zeros(2, total, dtype=torch.bool)
        for kind, line in lines:
            expected[kind, line] = True
        assert torch.equal(found, expected)


@pytest.mark.parametrize(("new", "total"), [(40, 40), (24, 64)])
def test_fewest_lines_hold_the_share_and_leave_their_input_alone(new: int, total: int) -> None:
    weights = rows(new, total, seed=9)
    before = weights.clone()
    columns = torch.arange(total - new, total)
    for alpha, found in zip((0.5, 0.9, 0.95), fewest_lines(weights, (0.95, 0.5, 0.9)), strict=True):
        mask = LinePattern(found[:1], found[1:], new).rows(columns)[0]
        diagonal = columns[:, None] == torch.arange(total)  # a pattern always computes it, which no line asked for
        mask &= ~diagonal | found[1, 0] | found[0]
        assert float((weights * mask).sum()) >= alpha * new - 1e-4
    assert torch.equal(weights, before)


def test_lines_that_hold_everything_are_found_alone() -> None:
    weights = torch.zeros(8, 12)
    for row in range(8):
        weights[row, 2] = 0.5
        weights[row, 4 + row - 3] += 0.5  # offset 3; in row 1 the same cell as column 2
    [found] = fewest_lines(weights, [1.0])
    assert found[0].nonzero().flatten().tolist() == [2]
    assert found[1].nonzero().flatten().tolist() == [3]


def test_overlap_and_what_chance_gives() -> None:
    first = torch.tensor([[True, True, False, False], [False] * 4, [True] * 4])
    second = torch.tensor([[True, False, True, False], [False] * 4, [True] * 4])
    assert jaccard(first, second).tolist() == pytest.approx([1 / 3, 1.0, 1.0])
    # Two of four twice share one on average: one of three.
    assert chance(first, second).tolist() == pytest.approx([1 / 3, 1.0, 1.0])


def test_chance_is_near_what_draws_share() -> None:
    draw = torch.Generator().manual_seed(0)
    first, second = (torch.rand(400, 200, generator=draw) < 0.2 for _ in range(2))
    assert float(chance(first, second).mean()) == pytest.approx(float(jaccard(first, second).mean()), abs=0.01)


def test_coverage_by_row_and_its_worst_tenth() -> None:
    heads = structured_heads(2, 1, 40, 70, 32, seed=3)
    probabilities, columns = softmax_rows(heads)
    assert torch.allclose(probabilities.sum(2), torch.ones(2, 40), atol=1e-5)
    assert torch.equal(probabilities[1:], softmax_rows(heads, head=1)[0])
    line = torch.arange(70).expand(2, -1)
    pattern = LinePattern(line < 4, line < 8, 40)
    by_row = row_coverage(pattern, probabilities, columns)
    assert torch.allclose(by_row.mean(1), pattern.coverage(probabilities, columns), atol=1e-5)
    assert torch.allclose(worst_tenth(by_row), by_row.sort(1).values[:, :4].mean(1))
    assert worst_tenth(torch.tensor([[0.3, 0.1, 0.2]])).tolist() == pytest.approx([0.1])
