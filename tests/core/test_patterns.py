"""Every pattern attends as dense attention does under its mask, is causal, and tells its cost truly."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loopserve.core.patterns import TILE, AttentionPattern, BlockPattern, DensePattern, LinePattern
from loopserve.kernels.dense_attention.reference import masked_attention
from tests.kernels.cases import Case, cases

KINDS = ("dense", "lines", "lines with dense heads", "window", "blocks")


def pattern_for(case: Case, kind: str, share: float) -> AttentionPattern:
    heads, new, total = case.queries.shape[0], case.queries.shape[1], case.keys.shape[1]
    if kind == "dense":
        return DensePattern(heads, new, total)
    if kind == "window":
        return LinePattern.window(heads, new, total, case.bools(heads, total, share=share), local=5)
    if kind == "blocks":
        return BlockPattern(case.bools(heads, -(-new // TILE), -(-total // TILE), share=share), new, total)
    dense_heads = case.bools(heads, share=0.5) if kind != "lines" else None
    lines = case.bools(heads, total, share=share), case.bools(heads, total, share=share)
    return LinePattern(*lines, new, dense_heads)


@given(cases(), st.sampled_from(KINDS), st.sampled_from([0.0, 0.05, 0.5]))
@settings(max_examples=150)
def test_attend_equals_dense_attention_under_the_mask(case: Case, kind: str, share: float) -> None:
    pattern = pattern_for(case, kind, share)
    mask = pattern.to_mask().unflatten(0, (case.keys.shape[0], -1))
    if case.first_valid is not None:
        mask = mask & (torch.arange(case.keys.shape[1]) >= case.first_valid[:, None, None, None])
    wanted, wanted_lse = masked_attention(
        case.queries, case.keys, case.values, mask, scaling=case.scaling, softcap=case.softcap
    )
    output, lse = pattern.attend(case.queries, case.keys, case.values, need_lse=True, **case.options)
    torch.testing.assert_close(output, wanted, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(lse, wanted_lse, atol=2e-5, rtol=1e-4)


@given(cases(), st.sampled_from(KINDS), st.sampled_from([0.0, 0.05, 0.5, 1.0]))
@settings(max_examples=150)
def test_patterns_are_causal_see_themselves_and_count_their_cells(case: Case, kind: str, share: float) -> None:
    pattern = pattern_for(case, kind, share)
    mask = pattern.to_mask()
    new, total = pattern.new_tokens, pattern.total_tokens
    own = torch.arange(total - new, total)
    assert not mask[:, torch.arange(total) > own[:, None]].any()
    assert mask[:, torch.arange(new), own].all()
    cells = mask.sum((1, 2)).double() / pattern.causal_pairs
    torch.testing.assert_close(pattern.cell_density().double(), cells)
    tiles = pattern.tile_density()
    assert (tiles > 0).all() and (tiles <= 1).all()
    probabilities = torch.rand(pattern.heads, new, total, generator=case.generator)
    inside = (probabilities * mask).sum((1, 2)) / probabilities.sum((1, 2))
    torch.testing.assert_close(pattern.coverage(probabilities, own), inside)


@given(st.integers(1, 40), st.integers(0, 60))
def test_line_geometry(new: int, history: int) -> None:
    """paper.md 6.1: lengths of lines; one shared cell exactly where history <= j + d < n; every cell on one of each."""
    total = new + history
    rows, columns = torch.arange(new)[:, None] + history, torch.arange(total)
    causal = columns <= rows
    for line in {0, 1, history, total - 1, total // 2} & set(range(total)):
        length = new - max(0, line - history)
        assert int((causal & (columns == line)).sum()) == length
        assert int((causal & (rows - columns == line)).sum()) == length
        for offset in {0, total - 1 - line, max(history - line, 0), total // 3} & set(range(total)):
            shared = int((causal & (columns == line) & (rows - columns == offset)).sum())
            assert shared == (history <= line + offset <= total - 1)


def test_an_isolated_slash_costs_a_tile_and_its_neighbour_nearly_nothing() -> None:
    def tiles(offsets: list[int]) -> float:
        slashes = torch.zeros(1, 4096, dtype=torch.bool)
        slashes[0, offsets] = True
        return float(LinePattern(torch.zeros_like(slashes), slashes, 1024).tile_density())

    alone, run, scattered = tiles([1000]), tiles(list(range(1000, 1032))), tiles(list(range(1000, 3048, 64)))
    assert run < 2.1 * alone
    assert scattered > 10 * alone


def test_forms_that_do_not_fit_are_refused() -> None:
    lines = torch.zeros(2, 10, dtype=torch.bool)
    with pytest.raises(ValueError, match="bool"):
        LinePattern(lines.float(), lines, 5)
    with pytest.raises(ValueError, match="11 new tokens of 10"):
        LinePattern(lines, lines, 11)
    with pytest.raises(ValueError, match=r"must be bool \[Hq, 1, 1\]"):
        BlockPattern(torch.zeros(2, 2, 2, dtype=torch.bool), 5, 10)
