"""Every pattern attends as dense attention does under its mask, is causal, and reports its cost exactly."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loopserve.core.policy.patterns import TILE, AttentionPattern, BlockPattern, DensePattern, LinePattern
from loopserve.kernels.masked import masked_attention
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
    mask = pattern.to_mask()
    if case.first_valid is not None:
        start = case.first_valid.repeat_interleave(case.queries.shape[0] // case.keys.shape[0])
        mask = mask & (torch.arange(case.keys.shape[1]) >= start[:, None, None])
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
    heads, new, total = pattern.size
    own = torch.arange(total - new, total)
    assert not mask[:, torch.arange(total) > own[:, None]].any()
    assert mask[:, torch.arange(new), own].all()
    torch.testing.assert_close(pattern.cell_density(), (mask.sum((1, 2)).double() / pattern.causal_pairs).float())
    tiles = pattern.tile_density()
    assert (tiles > 0).all() and (tiles <= 1).all()
    probabilities = torch.rand(heads, new, total, generator=case.generator).tril(total - new)
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


@given(cases(), st.sampled_from([0.0, 0.02, 0.3]))
@settings(max_examples=50)
def test_tiles_of_lines_counted_one_by_one(case: Case, share: float) -> None:
    pattern = pattern_for(case, "lines", share)
    assert isinstance(pattern, LinePattern)
    heads, new, total = pattern.size
    for head in range(min(heads, 2)):
        computed = dense = 0
        for start in range(0, new, TILE):
            first, end = total - new + start, total - new + min(start + TILE, new)
            offsets = pattern.slashes[head].nonzero().flatten().tolist()
            reached = {row - offset for row in range(first, end) for offset in offsets if row >= offset}
            packed = set(pattern.verticals[head, :end].nonzero().flatten().tolist()) - reached
            dense += -(-end // TILE)
            computed += min(-(-len(reached) // TILE) + -(-len(packed) // TILE), -(-end // TILE))
        assert float(pattern.tile_density()[head]) == pytest.approx(computed / dense)


@given(st.integers(1, 30), st.integers(0, 40), st.integers(0, 1000))
@settings(max_examples=40)
def test_the_mass_of_a_union_is_its_lines_without_their_crossings(new: int, history: int, seed: int) -> None:
    total, generator = new + history, torch.Generator().manual_seed(seed)
    verticals, slashes = torch.rand(2, 1, total, generator=generator) < 0.3
    pattern = LinePattern(verticals, slashes, new)
    own = torch.arange(history, total)
    offsets = own[:, None] - torch.arange(total)
    mass = torch.rand(1, new, total, generator=generator) * (offsets >= 0)
    on_vertical = pattern.verticals[0].expand(new, -1)
    on_slash = pattern.slashes[0][offsets.clamp(min=0)]
    separate = (mass * on_vertical).sum() + (mass * on_slash).sum() - (mass * (on_vertical & on_slash)).sum()
    torch.testing.assert_close(separate, (mass * pattern.to_mask()).sum())


def test_dense_heads_compute_every_cell_and_say_so() -> None:
    lines = torch.zeros(3, 200, dtype=torch.bool)
    pattern = LinePattern(lines, lines, 70, dense_heads=torch.tensor([False, True, False]))
    assert pattern.dense_heads is not None and pattern.dense_heads.tolist() == [False, True, False]
    assert float(pattern.cell_density()[1]) == float(pattern.tile_density()[1]) == 1.0
    assert float(pattern.cell_density()[0]) < 0.02


def test_rows_without_mass_are_covered() -> None:
    lines = torch.zeros(1, 20, dtype=torch.bool)
    assert LinePattern(lines, lines, 5).coverage(torch.zeros(1, 2, 20), torch.tensor([16, 18])).tolist() == [1.0]


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
    with pytest.raises(ValueError, match="new_tokens=11"):
        LinePattern(lines, lines, 11)
    with pytest.raises(ValueError, match=r"must be bool \[Hq, 1, 1\]"):
        BlockPattern(torch.zeros(2, 2, 2, dtype=torch.bool), 5, 10)
