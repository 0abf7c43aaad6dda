"""``bench decode``, ``prefill`` and ``conversation``: whole models side by side."""

from __future__ import annotations

import pytest
import torch

from loopserve.bench.heads import PlantedSparsifier
from loopserve.bench.rows import Row
from loopserve.bench.speed.models import run_conversation, run_decode, run_prefill
from loopserve.bench.speed.parity import audited
from loopserve.bench.speed.sides import EngineSide, PlainSide, SharedModel
from loopserve.bench.speed.suite import ModelShape
from loopserve.kernels.backend import Operation
from loopserve.models.plain import forward, growing_cache, preallocated_cache
from tests.bench.speed.small import SHAPE, suite
from tests.bench.speed.test_kernels import one_row_off, wrong

PLAIN = "transformers, preallocated cache"


@pytest.fixture
def shared() -> SharedModel:
    return SharedModel(ModelShape.model_validate(SHAPE), "float32", 60, 5, "cpu")


def test_a_cache_written_in_place_gives_what_a_growing_one_gives(shared: SharedModel) -> None:
    written, growing = preallocated_cache(shared.pairs), growing_cache(shared.model, shared.pairs)
    storage = shared.pairs[0].keys.data_ptr()
    for ids in (shared.new_ids, shared.new_ids[:1], shared.new_ids[1:2]):
        torch.testing.assert_close(forward(shared.model, written, ids), forward(shared.model, growing, ids))
    assert shared.pairs[0].length == 67 and shared.pairs[0].keys.data_ptr() == storage


def test_sides_leave_the_shared_history_as_it_was_and_agree(shared: SharedModel) -> None:
    from loopserve.api import load_stack

    before = shared.pairs[1].keys.clone()
    plain, engine = PlainSide(shared, "preallocated"), EngineSide(shared, load_stack("dense"))
    for side in (plain, engine, plain):
        first, steps = side.answer(4)
        assert first > 0 and len(steps) == 3
    assert torch.equal(shared.pairs[1].keys[:, :60], before[:, :60])
    assert len(engine.session.tokens) == engine.session.cache.seen + 1 == 60 + 5 + 2
    assert engine.audit.errors.keys() == {"dense_attention", "decode_attention_batch"} and not engine.audit.problems


def test_decode_rows(shared: SharedModel) -> None:
    stacks = ["dense", "loopserve-paper", "loopserve", "h2o"]
    part = {
        **SHAPE,
        "tokens": [70, 140],
        "new_tokens": 4,
        "output_tokens": 4,
        "dense_output_tokens": 3,
        "stacks": stacks,
    }
    rows = list(run_decode(suite(decode=[part])))
    assert {row["stack"] for row in rows} == {*stacks, PLAIN, "transformers, growing cache"}
    for row in rows:
        assert row["op"] == "decode_step" and row["parity"] == "ok" and row["runs"] == 2
        assert row["ratio_sdpa"] > 0 and row["ratio_own_dense"] > 0 and row["ratio_growing_cache"] > 0
        assert row["worst_step_ms"] >= row["typical_step_ms"] > 0 and row["growth_from"] == 70
    ours = next(row for row in rows if row["stack"] == "loopserve")
    assert ours["impl_parts"]["decode_attention_batch"]
    assert 0 < ours["phase_shares"]["decode_attention_batch"] < 1
    assert "policy" not in ours["phase_shares"] and "unaudited" not in ours  # so short a history is decoded dense
    observing = next(row for row in rows if row["stack"] == "h2o")
    assert 0 < observing["phase_shares"]["policy"] < 1


def test_prefill_rows_say_that_the_density_was_planted() -> None:
    part = {**SHAPE, "tokens": 2000, "new_tokens": 256, "density": 0.3, "chooses_on": "structured"}
    short = {**SHAPE, "tokens": 96, "output_tokens": 3}
    rows = list(run_prefill(suite(prefill=[part], short=[short])))
    later = {row["stack"]: row for row in rows if row["op"] == "ttft"}
    assert later.keys() == {"dense", "loopserve", PLAIN}
    sparse = later["loopserve"]
    assert "structured heads" in sparse["data"] and "30% of the cells planted" in sparse["data"]
    assert 0 < sparse["choosing_ms"] < sparse["median_ms"] and sparse["impl_parts"]["vertical_slash"]
    assert later["dense"]["ratio_own_dense"] == 1.0 and later[PLAIN]["ratio_sdpa"] == 1.0
    ends = {row["stack"]: row for row in rows if row["op"] == "short_turn"}
    assert ends["loopserve"]["ratio_own_dense"] > 0 and ends["dense"]["parity"] == "ok"


def test_a_conversation_has_a_row_per_turn_and_stack() -> None:
    part = {**SHAPE, "tokens": 300, "turns": 2, "output_tokens": 3}
    rows = list(run_conversation(suite(conversation=[part])))
    assert [(row["op"], row["stack"], row["shape"]["turn"]) for row in rows] == [
        (op, stack, turn) for turn in (1, 2) for op in ("ttft", "decode_step") for stack in ("dense", "loopserve")
    ]
    assert rows[-1]["shape"]["n"] == 299 and rows[-1]["ratio_own_dense"] > 0


def batch_off(result: list[tuple[torch.Tensor, torch.Tensor]]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [one_row_off(each) for each in result]


@pytest.mark.parametrize("op", ["decode_attention_batch", "dense_attention"])
def test_a_model_with_a_wrong_operation_gets_no_time(monkeypatch: pytest.MonkeyPatch, op: str) -> None:
    monkeypatch.setattr(
        Operation, "implementation", wrong(op, batch_off if op == "decode_attention_batch" else one_row_off)
    )
    part = {**SHAPE, "tokens": 70, "new_tokens": 4, "output_tokens": 3, "dense_output_tokens": 3}
    rows: list[Row] = list(run_decode(suite(decode=[part])))
    for row in rows:
        if row["stack"].startswith("transformers"):
            assert "median_ms" in row and "ratio_own_dense" not in row
        else:
            assert row["parity"] == "failed" and row["error"].startswith(op) and "median_ms" not in row


def test_the_audit_looks_at_every_operation_of_a_sparse_turn() -> None:
    from loopserve.api import load_stack
    from loopserve.bench.heads import structured_heads
    from loopserve.bench.speed.parity import as_call, lines_sparsifier

    heads = structured_heads(2, 1, 300, 300, 32)
    with audited() as seen:
        pattern = PlantedSparsifier(lines_sparsifier(0.9), 0.4).sparsify(as_call(heads))
        pattern.attend(*heads.tensors, scaling=heads.scaling)
    assert seen.errors.keys() == {"choose_lines", "vertical_slash"} and not seen.problems
    assert load_stack("loopserve").prefill.config is not None
