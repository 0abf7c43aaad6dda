"""Prefill policies: lines reach their target, rows are chosen fairly, dense where sparsity does not pay."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loopserve.api import load_stack
from loopserve.core.policy.interfaces import AttentionInputs, Phase
from loopserve.core.policy.patterns import DensePattern, LinePattern
from loopserve.policies.draws import Sampling, generator, sample_rows
from loopserve.policies.prefill.a_shape import AShapePrefill
from loopserve.policies.prefill.dense import DensePrefill
from loopserve.policies.prefill.loopserve import LoopServePrefill
from loopserve.policies.prefill.minference import MInferencePrefill
from loopserve.policies.prefill.tri_shape import TriShapePrefill
from loopserve.testing.assertions import assert_pattern, unchanged
from loopserve.testing.inputs import FakeRecord, make_inputs
from loopserve.testing.strategies import attention_inputs


def loopserve(**fields: Any) -> LoopServePrefill:
    small = {"min_new_tokens": 1, "min_total_tokens": 1, "sample_rows": 16, "sink_tokens": 1, "local_window": 1}
    return LoopServePrefill(LoopServePrefill.Config(**(small | {"dense_above": 1.0} | fields)))


def covered(inputs: AttentionInputs, pattern: LinePattern, rows: torch.Tensor) -> torch.Tensor:
    """Mass of some rows inside the pattern's mask, by the mask alone: ``[Hq, r]``."""
    probabilities = inputs.row_attention(rows).probabilities
    return (probabilities * pattern.to_mask()[:, rows]).sum(-1)


def lines(policy: LoopServePrefill, inputs: AttentionInputs) -> LinePattern:
    pattern = policy.sparsify(inputs)
    assert isinstance(pattern, LinePattern)
    return pattern


def recorded(inputs: AttentionInputs) -> FakeRecord:
    assert isinstance(inputs.record, FakeRecord)
    return inputs.record


@settings(max_examples=40)
@given(
    inputs=attention_inputs(max_tokens=70),
    alpha=st.sampled_from([0.3, 0.8, 0.95]),
    cost=st.sampled_from(["length", "tile"]),
    sampling=st.sampled_from(list(Sampling)),
)
def test_every_head_reaches_alpha_on_its_sample(
    inputs: AttentionInputs, alpha: float, cost: str, sampling: Sampling
) -> None:
    policy = loopserve(alpha=alpha, cost=cost, sampling=sampling)
    with unchanged(inputs):
        pattern = lines(policy, inputs)
    assert_pattern(pattern, inputs)
    shares = covered(inputs, pattern, inputs.scratch["sampled_rows"]).mean(-1)
    assert (shares >= alpha - 1e-4).all()
    estimated = recorded(inputs).values["coverage_estimated"][-1]
    assert torch.allclose(estimated.float(), shares, atol=1e-4)


@settings(max_examples=25)
@given(inputs=attention_inputs(max_tokens=60, evictions=False), cost=st.sampled_from(["length", "tile"]))
def test_more_alpha_never_covers_or_costs_less(inputs: AttentionInputs, cost: str) -> None:
    shares, cells = [], []
    for alpha in (0.3, 0.6, 0.9, 0.99):
        pattern = lines(loopserve(alpha=alpha, cost=cost, sample_rows=100), inputs)
        shares.append(recorded(inputs).values["coverage_estimated"][-1])
        cells.append(pattern.cell_density())
    assert (torch.stack(shares).diff(dim=0) >= -1e-5).all()
    assert (torch.stack(cells).diff(dim=0) >= -1e-9).all()


@settings(max_examples=25)
@given(inputs=attention_inputs(max_tokens=60, evictions=False), cost=st.sampled_from(["length", "tile"]))
def test_a_smaller_least_weight_never_covers_or_costs_less(inputs: AttentionInputs, cost: str) -> None:
    shares, cells = [], []
    for weight in (0.5, 0.05, 0.01, 0.001, None):
        pattern = lines(loopserve(alpha=0.9, cost=cost, sample_rows=100, least_weight=weight), inputs)
        assert_pattern(pattern, inputs)
        shares.append(recorded(inputs).values["coverage_estimated"][-1])
        cells.append(pattern.cell_density())
    assert (torch.stack(shares).diff(dim=0) >= -0.01).all()
    assert (torch.stack(cells).diff(dim=0) >= -0.01).all()
    assert (shares[-1] >= 0.9 - 1e-4).all()


def test_heads_share_one_least_weight_and_none_is_dense_for_missing_alpha() -> None:
    inputs = make_inputs(new_tokens=200, total_tokens=300, kv_heads=2, group=2, structured=True)
    pattern = lines(loopserve(alpha=0.999, sample_rows=64, least_weight=0.02, dense_above=0.75), inputs)
    shares = recorded(inputs).values["coverage_estimated"][-1]
    assert pattern.dense_heads is not None and not pattern.dense_heads.any()
    assert (shares < 0.99).all() and shares.max() > shares.min() + 0.05


@settings(max_examples=25)
@given(inputs=attention_inputs(min_new_tokens=4, max_tokens=60))
def test_a_row_floor_holds_for_every_row(inputs: AttentionInputs) -> None:
    pattern = lines(loopserve(alpha=0.5, row_floor=0.8), inputs)
    assert (covered(inputs, pattern, inputs.scratch["sampled_rows"]) >= 0.8 - 1e-4).all()


def test_forced_lines_are_in_every_head_and_never_on_filler() -> None:
    inputs = make_inputs(new_tokens=20, total_tokens=60, evicted=8, ragged=5)
    pattern = lines(loopserve(alpha=0.01, sink_tokens=3, local_window=4), inputs)
    assert inputs.first_valid is not None
    for head in range(4):
        start = int(inputs.first_valid[head // 2])
        assert pattern.verticals[head, start : start + 3].all() and not pattern.verticals[head, :start].any()
        assert pattern.slashes[head, :4].all()


def test_the_same_seed_gives_the_same_lines_whatever_else_is_drawn() -> None:
    def chosen(seed: int, turn: int = 0) -> LinePattern:
        torch.rand(3)
        return lines(loopserve(seed=seed, sampling="uniform"), make_inputs(new_tokens=64, total_tokens=90, turn=turn))

    before = torch.random.get_rng_state()
    same, again, other, later = chosen(1), chosen(1), chosen(2), chosen(1, turn=1)
    assert torch.equal(same.verticals, again.verticals) and torch.equal(same.slashes, again.slashes)
    assert not torch.equal(same.verticals, other.verticals)
    assert not torch.equal(same.verticals, later.verticals)
    torch.random.set_rng_state(before)
    lines(loopserve(), make_inputs(new_tokens=64, total_tokens=90))
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize(("new", "rows"), [(3, 1), (100, 25), (256, 64), (400, 64)])
def test_short_turns_are_sampled_up_to_a_share(new: int, rows: int) -> None:
    inputs = make_inputs(new_tokens=new, total_tokens=420)
    lines(loopserve(sample_rows=64, sample_share=0.25), inputs)
    assert len(inputs.scratch["sampled_rows"]) == rows


@given(
    total=st.integers(1, 200),
    count=st.integers(1, 250),
    sampling=st.sampled_from(list(Sampling)),
    seed=st.integers(0, 99),
)
def test_sampled_rows_are_sorted_distinct_and_as_many_as_asked(
    total: int, count: int, sampling: Sampling, seed: int
) -> None:
    rows = sample_rows(total, count, sampling, generator(seed))
    assert len(rows) == min(total, count)
    assert (rows[1:] > rows[:-1]).all() and rows[0] >= 0 and rows[-1] < total
    if sampling is Sampling.LAST:
        assert rows[0] == total - len(rows)
    if sampling is Sampling.MIXED and count < total:
        assert set(range(total - count // 2, total)) <= set(rows.tolist())
    if sampling is Sampling.STRATIFIED and count < total:
        middles = (torch.arange(count) + 0.5) * total / count
        assert ((rows - middles).abs() <= total / count / 2 + 1).all()


def question_first(last_look: int = 5) -> AttentionInputs:
    """The first rows of the turn look far back at one place, all later ones at another."""
    inputs = make_inputs(new_tokens=256, total_tokens=512, kv_heads=1, group=1, head_dim=32, seed=3)
    inputs.keys[:, :, :2] = 0
    inputs.queries[:, :, :2] = 0
    inputs.keys[:, 100:110, 0] = 12.0
    inputs.keys[:, last_look : last_look + 10, 1] = 12.0
    inputs.queries[:, :64, 0] = 12.0
    inputs.queries[:, 64:, 1] = 12.0
    return inputs


def test_last_rows_miss_a_question_at_the_front_and_random_rows_do_not() -> None:
    front = torch.arange(64)
    by_sampling = {
        sampling: float(
            covered(
                inputs := question_first(),
                lines(loopserve(alpha=0.98, sampling=sampling, sample_rows=64), inputs),
                front,
            ).mean()
        )
        for sampling in ("last", "uniform", "stratified", "mixed")
    }
    assert by_sampling.pop("last") < 0.2
    assert all(share > 0.7 for share in by_sampling.values()), by_sampling


def test_held_out_coverage_is_measured_on_other_rows() -> None:
    inputs = question_first()
    lines(loopserve(alpha=0.9, sampling="last", sample_rows=64, held_out_rows=64), inputs)
    values = recorded(inputs).values
    assert float(values["coverage_estimated"][0]) > 0.9 > float(values["coverage_held_out"][0])


@pytest.mark.parametrize("fields", [{"last_rows_weight": 50.0}, {"row_weights": "far"}])
def test_weights_move_the_target_to_the_rows_that_matter(fields: dict[str, Any]) -> None:
    """A tenth of the rows looks at something of its own; equal weights let them go, weights do not."""
    inputs = make_inputs(new_tokens=200, total_tokens=400, kv_heads=1, group=1, head_dim=32, seed=1)
    inputs.keys[:, :, :2] = 0
    inputs.queries[:, :, :2] = 0
    inputs.keys[:, 0, 1] = 12.0  # a sink: most rows look nowhere else
    inputs.queries[:, :180, 1] = 12.0
    inputs.keys[:, 90:100, 0] = 12.0
    inputs.queries[:, 180:, 0] = 12.0
    rows = torch.arange(180, 200)

    def share(**more: Any) -> float:
        policy = loopserve(alpha=0.85, sample_rows=40, sampling="uniform", cost="length", **more)
        return float(covered(inputs, lines(policy, inputs), rows).mean())

    assert share() < 0.5 < share(**fields)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"alpha": 1.0}, "alpha_is_one"),
        ({"min_new_tokens": 33}, "short_turn"),
        ({"min_total_tokens": 65}, "short_conversation"),
    ],
)
def test_dense_fallbacks_are_counted(fields: dict[str, Any], reason: str) -> None:
    inputs = make_inputs(new_tokens=32, total_tokens=64)
    assert isinstance(loopserve(**fields).sparsify(inputs), DensePattern)
    assert recorded(inputs).counters == {f"fallback:{reason}": 1}


def test_heads_that_would_be_nearly_dense_are_dense() -> None:
    inputs = make_inputs(new_tokens=200, total_tokens=400, group=1)
    inputs.queries[0] = 0.0  # looks everywhere alike: no few lines hold its mass
    inputs.queries[1] = inputs.keys[1, :1] * 9  # looks at one key
    pattern = lines(loopserve(alpha=0.9, dense_above=0.5), inputs)
    assert pattern.cell_density()[0] == 1 and pattern.cell_density()[1] < 0.3
    assert recorded(inputs).counters == {"fallback:dense_head": 1}
    assert recorded(inputs).values["coverage_estimated"][0][0] == 1


@settings(max_examples=30)
@given(inputs=attention_inputs(max_tokens=60), sinks=st.integers(0, 9), local=st.integers(1, 20))
def test_a_shape_is_sinks_and_window(inputs: AttentionInputs, sinks: int, local: int) -> None:
    policy = AShapePrefill(AShapePrefill.Config(sink_tokens=sinks, local_window=local))
    with unchanged(inputs):
        pattern = policy.sparsify(inputs)
    assert_pattern(pattern, inputs)
    mask = pattern.to_mask()
    start = torch.zeros(1) if inputs.first_valid is None else inputs.first_valid
    starts = start.expand(inputs.keys.shape[0]).repeat_interleave(inputs.group)
    columns = torch.arange(inputs.total_tokens)
    offset = inputs.columns[:, None] - columns
    sink = (columns >= starts[:, None]) & (columns < starts[:, None] + sinks)
    wanted = ((offset < local) | sink[:, None]) & (offset >= 0)
    valid = (columns >= starts[:, None])[:, None].expand_as(mask)
    assert torch.equal(mask & valid, wanted & valid)


@pytest.mark.parametrize(
    ("total", "window"),
    [(50, 6), (100, 10), (205, 21), (1000, 40)],  # the least, the share rounded up, the most
)
def test_a_window_grows_with_the_conversation_between_its_bounds(total: int, window: int) -> None:
    options = {"sink_tokens": 3, "local_window": 40, "local_share": 0.1, "min_local_window": 6}
    fixed = {"sink_tokens": 3, "local_window": window}
    inputs = make_inputs(new_tokens=30, total_tokens=total)
    for kind in (AShapePrefill, TriShapePrefill):
        scaled, same = (kind(kind.Config(**each)).sparsify(inputs) for each in (options, fixed))
        assert torch.equal(scaled.to_mask(), same.to_mask())


@pytest.mark.parametrize(("total", "sizes"), [(60, (3, 6)), (205, (11, 21)), (1000, (20, 30))])
def test_minference_sizes_grow_with_the_conversation_up_to_their_limit(total: int, sizes: tuple[int, int]) -> None:
    forced = {"sink_tokens": 1, "local_window": 2}
    shares = {"vertical_size": 20, "slash_size": 30, "vertical_share": 0.05, "slash_share": 0.1}
    inputs = make_inputs(new_tokens=40, total_tokens=total, structured=True)
    pattern = MInferencePrefill(MInferencePrefill.Config(**forced, **shares)).sparsify(inputs)
    assert isinstance(pattern, LinePattern)
    assert set(pattern.verticals.sum(1).tolist()) == {sizes[0]} and set(pattern.slashes.sum(1).tolist()) == {sizes[1]}


@pytest.mark.parametrize("preset", ["minference", "a_shape", "tri_shape"])
@pytest.mark.parametrize("tokens", [2048, 4096, 8192])
def test_a_preset_that_scales_computes_a_tenth_to_a_quarter_of_a_first_turn(preset: str, tokens: int) -> None:
    inputs = make_inputs(new_tokens=tokens, total_tokens=tokens, kv_heads=1, group=2, structured=True)
    density = float(load_stack(preset).prefill.sparsify(inputs).cell_density().mean())
    assert 0.1 <= density <= 0.25
    absolute = float(load_stack(f"{preset}-paper").prefill.sparsify(inputs).cell_density().mean())
    assert absolute > 2 * density


def test_dense_computes_everything() -> None:
    inputs = make_inputs()
    pattern = DensePrefill().sparsify(inputs)
    assert_pattern(pattern, inputs)
    assert (pattern.cell_density() == 1).all() and inputs.phase is Phase.PREFILL
