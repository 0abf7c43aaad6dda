"""Selects lines from numbers that no softmax gives, under one implementation. Started by ``test_odd_numbers`` with a time limit.

``python -m tests.kernels.odd_numbers IMPLEMENTATION`` exits with an error where a selection is not valid.
"""

from __future__ import annotations

import itertools
import math
import sys

import torch
from torch import Tensor

from loopserve.kernels import backend
from loopserve.kernels.choose_lines import choose_lines
from loopserve.kernels.line_scores import line_scores
from loopserve.kernels.select_lines import LineSelection, select_lines
from loopserve.kernels.token_scores import token_scores
from loopserve.kernels.top_columns import top_columns
from tests.kernels.test_select_lines import rows_of_heads

NEW, TOTAL, SAMPLED, ALPHA = 40, 70, 12, 0.9
NAN, INF = math.nan, math.inf
NOT_FINITE = {
    "a NaN": (slice(1, 2), slice(3, 4), slice(5, 6), NAN),
    "a row of NaN": (slice(1, 2), slice(3, 4), slice(None), NAN),
    "a head of NaN": (slice(1, 2), slice(None), slice(None), NAN),
    "only NaN": (slice(None), slice(None), slice(None), NAN),
    "an inf": (slice(1, 2), slice(3, 4), slice(5, 6), INF),
    "an inf in each row": (slice(1, 2), slice(None), slice(2, 3), INF),
    "a -inf": (slice(1, 2), slice(3, 4), slice(5, 6), -INF),
    "a row of -inf": (slice(None), slice(3, 4), slice(None), -INF),
}
FACTORS = {"huge": 3e38, "tiny": 1e-44, "negative": -1.0}
OPTIONS = list(itertools.product((None, 0.8), ("length", "tile"), (ALPHA, 1.0), (INF, 30.0)))
INTERPRETED = [(None, "tile", ALPHA, INF)]  # the interpreter takes a second for each call
ODD = list(itertools.product((NAN, INF, -INF, 1e38), ("queries", "keys", "a key", "all")))


def check(what: str, selection: LineSelection, heads: int) -> None:
    for lines in selection[:2]:
        assert lines.dtype is torch.bool and lines.shape == (heads, TOTAL), what
    assert not selection.coverage.isnan().any(), what


def given(every: list[tuple[float | None, str, float, float]]) -> None:
    """Rows that are given."""
    plain, columns = rows_of_heads(NEW, TOTAL, SAMPLED, seed=1)
    for floor, cost, alpha, most in every:
        options = {"alpha": alpha, "cost": cost, "row_floor": floor, "most_cost": most}
        for name, (heads, rows, keys, number) in NOT_FINITE.items():
            odd = plain.clone()
            odd[heads, rows, keys] = number
            selection = select_lines(odd, columns, NEW, **options)  # type: ignore[arg-type]
            check(name, selection, len(plain))
            if most == INF:  # what is not finite is no mass: the rest is covered, in this head and in the others
                finite = odd.nan_to_num(0.0, 0.0, 0.0)
                assert (selection.coverage >= alpha - 1e-4).all(), name
                torch.testing.assert_close(
                    coverage_of(selection, finite, columns), selection.coverage, atol=1e-4, rtol=1e-4
                )
        for name, factor in FACTORS.items():
            odd = plain.clone()
            odd[1] *= factor
            selection = select_lines(odd, columns, NEW, **options)  # type: ignore[arg-type]
            if name != "huge":  # sums of such rows overflow, and so may the coverage; that it ends is all that is asked
                check(name, selection, len(plain))


def coverage_of(selection: LineSelection, probabilities: Tensor, columns: Tensor) -> Tensor:
    """Return the share of each head's mass on the lines, cell by cell."""
    offsets = columns[:, None] - torch.arange(TOTAL)
    mask = (selection.verticals[:, None] | selection.slashes[:, offsets.clamp(min=0)]) & (offsets >= 0)
    whole = probabilities.sum((1, 2))
    return ((probabilities * mask).sum((1, 2)) / whole.clamp(min=1e-30)).masked_fill(whole <= 0, 1.0)


def scored(every: list[tuple[float | None, str, float, float]], odd: list[tuple[float, str]]) -> None:
    """The same from queries and keys in which some numbers are odd."""
    source = torch.Generator().manual_seed(0)
    columns = torch.randperm(NEW, generator=source)[:SAMPLED].sort().values + TOTAL - NEW
    for number, where in odd:
        queries, keys = torch.randn(4, SAMPLED, 32, generator=source), torch.randn(2, TOTAL, 32, generator=source)
        if where in ("queries", "all"):
            queries[1, 3] = number
        if where in ("keys", "all"):
            keys[:] = number
        if where == "a key":
            keys[1, 5, 7] = number
        for floor, cost, alpha, most in every:
            options = {"alpha": alpha, "cost": cost, "row_floor": floor, "most_cost": most}
            selection = choose_lines(queries, keys, columns, NEW, scaling=0.2, **options)  # type: ignore[arg-type]
            check(f"{number} in {where}", selection, 4)
        line_scores(queries, keys, columns, scaling=0.2)
        scores = token_scores(queries, keys, columns, scaling=0.2)
        chosen = top_columns(scores, 9, sink_tokens=2, recent_window=3)
        assert chosen.shape == (2, 9) and (chosen.diff() > 0).all() and chosen.min() >= 0 and chosen.max() < TOTAL


if __name__ == "__main__":
    interpreted = sys.argv[1] == "triton"
    if interpreted:  # the interpreter pays per step, not per number
        from loopserve.kernels.gpu import lines

        lines._LINES, lines._ROWS = 256, 64
    with backend.use(sys.argv[1]):
        given(INTERPRETED if interpreted else OPTIONS)
        scored(INTERPRETED if interpreted else OPTIONS[::3], ODD[::5] if interpreted else ODD)
