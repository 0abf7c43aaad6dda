"""Numbers are stated in every turn, asked for at every place, and dense attention is the same as no policy at all."""

from __future__ import annotations

import re
from typing import Any

import torch

from loopserve.api import load_stack
from loopserve.models.bridge import IMPLEMENTATION, TransformersModel
from loopserve.models.layers import set_implementation
from loopserve.models.tiny import tiny_model
from research.evidence_real import needles
from research.evidence_real.needles import POSITIONS, last_message, make_dialogue


class Words:
    """A tokenizer with one token per word, digit or mark."""

    chat_template: str | None = "roles in brackets"

    def encode(self, text: str, **options: Any) -> list[int]:
        parts = re.findall(r"\d|[a-z]+|[^\sa-z]", text.lower())
        return [10 + int(each) if each.isdigit() else 30 + sum(map(ord, each)) % 120 for each in parts]

    def decode(self, ids: list[int]) -> str:
        return str(ids[0] - 10) if 10 <= ids[0] < 20 else "x"

    def apply_chat_template(self, messages: list[dict[str, str]], **options: Any) -> str:
        return "".join(f"<{each['role']}>{each['content']}" for each in messages) + "<assistant>"


def test_every_turn_tells_numbers_and_every_place_asks_for_them() -> None:
    dialogue = make_dialogue(Words(), 2000, 3)
    whole = [*dialogue.messages, dialogue.last]
    assert {question.position for question in dialogue.questions} == set(POSITIONS)
    for question in dialogue.questions:
        text = whole[len(whole) - 1 - question.back]
        assert f"The magic number of the {question.thing} is {question.number}." in text
        message = last_message(dialogue, question)
        asked = message.index(f"What is the magic number of the {question.thing}?") / len(message)
        low, high = {"begin": (0.0, 0.1), "middle": (0.2, 0.8), "end": (0.8, 1.0)}[question.position]
        assert low <= asked <= high
        assert question.number in message or question.back > 0


def test_the_same_seed_gives_the_same_dialogue_and_another_one_another() -> None:
    assert make_dialogue(Words(), 1500, 1) == make_dialogue(Words(), 1500, 1)
    assert make_dialogue(Words(), 1500, 1) != make_dialogue(Words(), 1500, 3)


def test_every_question_is_answered_under_every_stack() -> None:
    model = tiny_model("llama")
    set_implementation(model, IMPLEMENTATION)
    few = {"prefill": {"policy": "dense"}, "decode": {"policy": "streaming_llm", "budget": 40}}
    stacks = {"dense": load_stack("dense"), "few": load_stack(few)}
    torch.manual_seed(0)
    found = needles.measure(TransformersModel(model), Words(), 900, 0, stacks)
    for name in stacks:
        assert len(found[name]) == 9
        assert {(each["position"], each["back"]) for each in found[name]} == {
            (position, back) for position in POSITIONS for back in range(3)
        }
        assert all(each["of"] == 5 and 0 <= each["right"] <= 5 for each in found[name])
    assert all(each["attended"] == 1.0 for each in found["dense"])
    assert all(each["attended"] < 0.2 for each in found["few"])
