"""Rotations that depend on the length of a conversation: each conversation is rotated for its own, whoever shares its pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import loopserve
from loopserve.models.bridge import TransformersModel
from tests.faults.models import answer, engine, generated, ids, tiny, tokens

WINDOW = 64
LONGROPE = {
    "rope_type": "longrope",
    "factor": 4.0,
    "rope_theta": 1e4,
    "original_max_position_embeddings": WINDOW,
    "short_factor": [1.0] * 8,
    "long_factor": [1, 1.5, 2, 3, 4, 6, 8, 10.0],
}
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
KINDS = ["phi3", "phimoe", "llama", "dynamic"]


def model(kind: str = "phi3") -> PreTrainedModel:
    if kind == "dynamic":
        return tiny("llama", rope_parameters=dict(DYNAMIC), max_position_embeddings=WINDOW)
    more: dict[str, Any] = {"hidden_size": 64, "sliding_window": None, "max_position_embeddings": 4 * WINDOW}
    rope: dict[str, Any] = dict(LONGROPE)
    if kind == "phimoe":
        rope |= {"short_mscale": 1.0, "long_mscale": 1.2}
        more |= {"num_local_experts": 4, "num_experts_per_tok": 2}
    return tiny(kind, rope_parameters=rope, original_max_position_embeddings=WINDOW, **more)


def whole(kind: str, conversation: list[int]) -> Tensor:
    """The logits of transformers for a conversation that is computed at once, by a model that has seen no other."""
    with torch.no_grad():
        logits: Tensor = model(kind)(torch.tensor([conversation]), use_cache=False).logits[0, -1]
    return logits


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [40, 64, 65, 120])
def test_a_prompt_read_in_chunks_is_rotated_as_the_whole(kind: str, length: int) -> None:
    served = engine(model(kind), chunk_tokens=25)
    found = served.prefill(served.session(), tokens(length, 1))
    assert torch.allclose(found, whole(kind, tokens(length, 1)), atol=1e-4)


@pytest.mark.parametrize("kind", ["phi3", "dynamic"])
def test_an_answer_that_crosses_the_window_is_that_of_transformers(kind: str) -> None:
    if kind == "dynamic":
        wanted = generated(model(kind), ids(60, 1), 12)
    else:  # some versions of transformers lose the conversation at the window, in their own generate
        wanted = []
        for _ in range(12):
            wanted.append(int(whole(kind, tokens(60, 1) + wanted).argmax()))
    served = engine(model(kind))
    assert answer(served, served.session(), tokens(60, 1), 12) == wanted
    applied = model(kind)
    with loopserve.apply(applied, "dense"):
        assert generated(applied, ids(60, 1), 12) == wanted


@pytest.mark.parametrize("kind", KINDS)
def test_turns_across_the_window_and_back_by_undo(kind: str) -> None:
    served = engine(model(kind))
    session = served.session()
    first = tokens(50, 1) + answer(served, session, tokens(50, 1), 6)
    found = served.prefill(session, tokens(40, 2))
    assert torch.allclose(found, whole(kind, first + tokens(40, 2)), atol=1e-4)
    session.undo()
    found = served.prefill(session, tokens(5, 3))
    assert torch.allclose(found, whole(kind, first + tokens(5, 3)), atol=1e-4)
    copy = session.fork()
    copy.undo()
    found = served.prefill(copy, tokens(40, 2))
    assert torch.allclose(found, whole(kind, first + tokens(40, 2)), atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_no_conversation_leaks_into_another(kind: str) -> None:
    served = engine(model(kind))
    other = served.session()
    served.prefill(other, tokens(150, 4))
    for length in (30, WINDOW, 90):
        found = served.prefill(served.session(), tokens(length, 5))
        assert torch.allclose(found, whole(kind, tokens(length, 5)), atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_conversations_on_both_sides_share_a_pass(kind: str) -> None:
    lengths = (20, WINDOW, 61, 110)
    served = engine(model(kind), chunk_tokens=40)
    alone = [answer(served, served.session(), tokens(length, length), 6) for length in lengths]
    turns = [
        served.begin(served.session(), tokens(length, length), lambda logits: int(logits.argmax()), max_new_tokens=6)
        for length in lengths
    ]
    while waiting := [turn for turn in turns if not turn.finished]:
        served.run(waiting)
    assert [turn.output for turn in turns] == alone


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_one_batch_with_different_lengths(kind: str) -> None:
    lengths, longest = (30, 61, 110), 110
    rows = [tokens(length, length) for length in lengths]
    batch = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    applied = model(kind)
    with loopserve.apply(applied, "dense"):
        alone = [generated(applied, torch.tensor([row]), 6) for row in rows]
        found = applied.generate(batch, attention_mask=mask, max_new_tokens=6, do_sample=False)
    assert found[:, longest:].tolist() == alone
    assert alone[0] == generated(model(kind), torch.tensor([rows[0]]), 6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("piece", [1, 15])
def test_an_own_loop_across_the_window(kind: str, piece: int) -> None:
    applied = model(kind)
    with loopserve.apply(applied, "dense"), torch.no_grad():
        cache = applied(ids(60, 1), use_cache=True).past_key_values
        for start in range(0, 15, piece):
            output = applied(ids(15, 2)[:, start : start + piece], past_key_values=cache)
    if kind == "dynamic" and piece == 1:
        return  # within an answer each key stays as it was rotated, as in transformers
    assert torch.allclose(output.logits[0, -1], whole(kind, tokens(60, 1) + tokens(15, 2)), atol=1e-4)


def test_a_prompt_given_in_chunks_by_generate() -> None:
    wanted = generated(model(), ids(100, 1), 4)
    applied = model()
    with loopserve.apply(applied, "dense"):
        assert generated(applied, ids(100, 1), 4, prefill_chunk_size=30) == wanted


def test_a_sparse_stack_goes_on_across_the_window() -> None:
    stack = {
        "prefill": {"policy": "dense"},
        "decode": {"policy": "snapkv", "budget": 32, "window": 4, "sink_tokens": 1},
    }
    served = engine(model(), stack)
    session = served.session()
    assert len(answer(served, session, tokens(60, 1), 12)) == 12
    assert session.stats.counters["computed_anew"] == 1
    assert session.rotation == WINDOW + 1
    assert len(answer(served, session, tokens(5, 2), 3)) == 3


@pytest.mark.parametrize(
    ("rope", "limit"),
    [
        ({"rope_type": "yarn", "original_max_position_embeddings": 64}, 256),
        ({"rope_type": "linear"}, 256),
        ({"rope_type": "dynamic"}, 256),
        ({"rope_type": "default"}, 64),
        ({"rope_type": "yarn", "original_max_position_embeddings": 8}, 64),
        (
            {
                "rope_type": "llama3",
                "original_max_position_embeddings": 32,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
            },
            128,
        ),
    ],
)
def test_15_the_limit_follows_the_scaling(rope: dict[str, Any], limit: int) -> None:
    scaled = tiny(rope_parameters={"factor": 4.0, "rope_theta": 1e4, **rope}, max_position_embeddings=64)
    assert TransformersModel(scaled).max_positions == limit


def test_15_the_limit_of_longrope() -> None:
    assert TransformersModel(model()).max_positions == 4 * WINDOW
