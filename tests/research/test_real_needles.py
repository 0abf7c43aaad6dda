"""Numbers are stated in every turn, asked for at every place, and dense attention is the same as no policy at all."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from loopserve.api import load_stack
from loopserve.core.engine.engine import TokenEngine
from loopserve.models.bridge import IMPLEMENTATION, TransformersModel
from loopserve.models.layers import set_implementation
from loopserve.models.tiny import tiny_model
from research.evidence_real import needles
from research.evidence_real.needles import POSITIONS, last_message, make_dialogue
from research.evidence_real.replay import ReplayModel, TurnRecorder, replayed


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


def test_forks_answer_as_a_conversation_of_its_own_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recorded turns, forks and shared passes save work and change no answer."""
    likeliest: dict[int, list[int]] = {}

    class Noting(needles._Digits):
        def __call__(self, logits: torch.Tensor) -> int:
            likeliest.setdefault(id(self), []).append(int(logits.argmax()))
            return super().__call__(logits)

    monkeypatch.setattr(needles, "_Digits", Noting)
    model = tiny_model("llama")
    set_implementation(model, IMPLEMENTATION)
    network, words = TransformersModel(model), Words()
    few = {"prefill": {"policy": "dense"}, "decode": {"policy": "quest", "budget": 40, "page": 8}}
    stacks = {"few": load_stack(few), "window": load_stack("streaming_llm")}
    dialogue = make_dialogue(words, 900, 0)
    asking = needles.Asking(network, words, dialogue, stacks)
    for question in dialogue.questions[:3]:
        likeliest.clear()
        found = dict(asking.ask(question))
        turns: list[list[int]] = []
        messages: list[dict[str, str]] = []
        for content in [*dialogue.messages, last_message(dialogue, question)]:
            messages.append({"role": "user", "content": content})
            ids = words.encode(words.apply_chat_template(messages))
            turns.append(ids[sum(map(len, turns)) :])
            messages.append({"role": "assistant", "content": "I have read it."})
        answer = words.encode(f"The magic number of the {question.thing} is {question.number}")
        for (name, stack), chosen in zip(stacks.items(), likeliest.values(), strict=True):
            engine, given, alone = TokenEngine(network, stack), iter(answer), list[int]()
            session = engine.session()
            for turn in turns[:-1]:
                engine.prefill(session, turn)

            def choose(logits: torch.Tensor, given: Iterator[int] = given, alone: list[int] = alone) -> int:
                alone.append(int(logits.argmax()))
                return next(given)

            list(engine.generate(session, turns[-1], choose, max_new_tokens=len(answer)))
            assert chosen[1:] == alone[1:]  # the first was chosen from a replayed pass, whose logits are not computed
            attended = session.stats.means["attended_fraction"]
            assert found[name]["attended"] == round(attended.total / attended.weight, 4)


def test_a_forked_recording_replays_its_own_tokens_only() -> None:
    model = tiny_model("llama")
    set_implementation(model, IMPLEMENTATION)
    network = TransformersModel(model)
    recorder = TurnRecorder(network)
    recorder.read([1, 2, 3])
    fork = recorder.fork()
    fork.read([4, 5])
    recording = fork.recording()
    assert (recording.tokens, recording.start) == ([1, 2, 3, 4, 5], 3)
    assert all(queries.shape[1] == 2 for queries, _ in recording.queries.values())
    engine = TokenEngine(ReplayModel(network, recording), replayed(load_stack("dense")))
    with pytest.raises(ValueError, match="not recorded"):
        engine.prefill(engine.session(), [1, 2, 3])
