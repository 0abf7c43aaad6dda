"""Masses of lines and tokens, and page bounds, against their definitions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loopserve.kernels import backend
from loopserve.kernels.key_codes import page_bounds, page_scores
from loopserve.kernels.line_scores import line_scores
from loopserve.kernels.token_scores import token_scores
from tests.kernels.cases import FAST, IMPLEMENTATIONS, Case, cases, make


def sampled(case: Case, data: st.DataObject) -> tuple[torch.Tensor, torch.Tensor]:
    """Some of the queries, and where they stand."""
    rows, total = case.queries.shape[1], case.keys.shape[1]
    chosen = torch.tensor(sorted(data.draw(st.sets(st.integers(0, rows - 1), min_size=1, max_size=12))))
    return case.queries[:, chosen], chosen + total - rows


@given(cases(most=120), st.data())
def test_line_masses_are_sums_of_the_rows(case: Case, data: st.DataObject) -> None:
    queries, columns = sampled(case, data)
    scores = line_scores(queries, case.keys, columns, **case.options)
    torch.testing.assert_close(scores.probabilities.sum(-1), torch.ones(queries.shape[:2]))
    torch.testing.assert_close(scores.vertical, scores.probabilities.sum(1))
    slash = torch.zeros_like(scores.slash)
    for row, column in enumerate(columns.tolist()):
        for key in range(column + 1):
            slash[:, column - key] += scores.probabilities[:, row, key]
        assert (scores.probabilities[:, row, column + 1 :] == 0).all()
    torch.testing.assert_close(scores.slash, slash)


@given(cases(), st.data())
def test_line_scores_equal_the_reference(case: Case, data: st.DataObject) -> None:
    total = case.keys.shape[1]
    columns = torch.tensor(data.draw(st.lists(st.integers(0, total - 1), min_size=1, max_size=9)))
    queries = torch.randn(case.queries.shape[0], len(columns), case.queries.shape[2], generator=case.generator)
    with backend.use("reference"):
        wanted = line_scores(queries, case.keys, columns, **case.options)
    for name in FAST:
        with backend.use(name):
            scores = line_scores(queries, case.keys, columns, **case.options)
        for found, right in zip(scores, wanted, strict=True):
            torch.testing.assert_close(found, right, atol=2e-6, rtol=1e-4)


def test_token_scores_in_several_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loopserve.kernels.token_scores._NUMBERS", 300)
    case = make(20, 50, group=2, dim=16, filler=True)
    columns = torch.arange(30, 50)
    for over_rows in ("mean", "sum", "max"):
        with backend.use("reference"):
            wanted = token_scores(case.queries, case.keys, columns, over_rows=over_rows, **case.options)
        for name in FAST:
            with backend.use(name):
                found = token_scores(case.queries, case.keys, columns, over_rows=over_rows, **case.options)
            torch.testing.assert_close(found, wanted)
    with pytest.raises(ValueError, match="over_rows='median' is unknown"):
        token_scores(case.queries, case.keys, columns, over_rows="median", **case.options)


@given(cases(), st.data(), st.sampled_from(["mean", "sum", "max"]))
def test_token_scores_join_rows_then_the_group(case: Case, data: st.DataObject, over_rows: str) -> None:
    queries, columns = sampled(case, data)
    rows = line_scores(queries, case.keys, columns, **case.options).probabilities
    joined = {"mean": rows.mean(1), "sum": rows.sum(1), "max": rows.amax(1)}[over_rows]
    wanted = joined.view(case.keys.shape[0], -1, case.keys.shape[1]).mean(1)
    for name in IMPLEMENTATIONS:
        with backend.use(name):
            found = token_scores(queries, case.keys, columns, over_rows=over_rows, **case.options)
        torch.testing.assert_close(found, wanted, atol=2e-6, rtol=1e-4)


@given(cases(), st.sampled_from([1, 4, 16, 300]))
def test_page_scores_bound_every_key_of_the_page(case: Case, page: int) -> None:
    case.keys.nan_to_num_(0.0)  # bounds know no filler: its pages are for the caller to leave out
    low, high = page_bounds(case.keys, page)
    bounds = page_scores(case.queries, low, high, scaling=case.scaling)
    grouped = case.queries.view(case.keys.shape[0], -1, case.queries.shape[2])
    best = (grouped @ case.keys.transpose(1, 2) * case.scaling).amax(1)
    assert bounds.shape == (case.keys.shape[0], -(-case.keys.shape[1] // page))
    assert (best <= bounds.repeat_interleave(page, dim=1)[:, : best.shape[1]] + 1e-4).all()
    if page == 1:
        torch.testing.assert_close(bounds, best)
