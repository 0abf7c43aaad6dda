"""Conversations and claims on a tiny model: whole where nothing is left out, less where something is."""

from __future__ import annotations

from typing import Any

import pytest

from loopserve.api import load_stack
from loopserve.models.bridge import IMPLEMENTATION, TransformersModel
from loopserve.models.layers import set_implementation
from loopserve.models.tiny import tiny_model
from research.evidence_real import claims, dialogues
from research.evidence_real.summary import Agreement
from research.evidence_real.texts import text
from tests.research.test_real_needles import Words

TOKENS = 700


@pytest.fixture(scope="module")
def model() -> TransformersModel:
    network = tiny_model("llama")
    set_implementation(network, IMPLEMENTATION)
    return TransformersModel(network)


def windowed(retention: str) -> Any:
    decode = {"policy": "streaming_llm", "budget": 60, "retention": retention}
    return load_stack({"prefill": {"policy": "dense"}, "decode": decode})


def test_a_text_is_given_piece_by_piece_without_gaps() -> None:
    class Numbered(Words):
        def encode(self, text: str, **options: Any) -> list[int]:
            return list(range(1000, 3000)) if text == "numbers" else super().encode(text)

    turns = dialogues.turns_of(Numbered(), "numbers", TOKENS)
    whole = [token for given, answer in turns for token in (*given, *answer) if token >= 1000]
    assert whole == list(range(1000, 1000 + len(whole)))
    assert [len(answer) for _, answer in turns] == [dialogues.ANSWER] * dialogues.TURNS
    assert TOKENS - 60 <= sum(len(given) + len(answer) for given, answer in turns) <= TOKENS + 60


def test_every_turn_agrees_without_a_policy_and_less_with_one(model: TransformersModel) -> None:
    stacks = {"dense": load_stack("dense"), "kept": windowed("keep"), "evicting": windowed("evict")}
    found = dialogues.measure(model, Words(), text("prose", 0), TOKENS, stacks)
    assert all(len(turns) == dialogues.TURNS for turns in found.values())
    assert all(Agreement([each]).kl < 1e-6 for each in found["dense"])
    assert all(Agreement([each]).kl > 1e-5 for each in found["kept"][1:])
    assert found["kept"][0]["kl"] == found["evicting"][0]["kl"]  # the first prefill saw everything
    assert found["kept"][-1]["kl"] != found["evicting"][-1]["kl"]


def test_more_mass_needs_more_lines_and_another_text_s_lines_hold_less(
    model: TransformersModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims, "loaded", lambda name: (model, Words()))
    found = claims.measure("tiny", "prose", 200, pairs=True)
    for name in ("lines_0.9", "cells_0.9", "overlap", "held", "own"):
        assert [len(layer) for layer in found[name]] == [4, 4, 4]
    for layer in range(3):
        for head in range(4):
            assert found["lines_0.9"][layer][head] <= found["lines_0.95"][layer][head]
            assert found["own"][layer][head] >= 0.85
            assert 0 <= found["overlap"][layer][head] <= 1
    mean = {name: sum(map(sum, found[name])) for name in ("held", "own")}
    assert mean["held"] <= mean["own"]
