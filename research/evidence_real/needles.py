"""Facts to find again: numbers stated in a conversation of several turns over a novel, asked for in its last turn.

The answer is teacher-forced; a digit is right if it is the likeliest token. So answers of all stacks are read at the same places.
"""

from __future__ import annotations

import gc
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from loopserve.api import load_stack
from loopserve.core.engine.engine import TokenEngine
from loopserve.core.engine.session import Session
from loopserve.core.engine.turn import Turn
from loopserve.core.stack.stack import PolicyStack
from loopserve.models.bridge import TransformersModel
from research.evidence_real.costs import prefill_figures
from research.evidence_real.replay import ReplayModel, TurnRecorder, decode_together, replayed
from research.evidence_real.texts import text

POSITIONS = ("begin", "middle", "end")
TURNS = 3
_SHARES = (0.45, 0.35, 0.2)  # of the text, by turn
_NEEDLES = 2  # per turn
ANSWER = 20
"""Tokens of an answer, about."""
_READ = "I have read it."
_THINGS = (
    "harbour", "violin", "glacier", "lantern", "orchard", "comet", "saddle", "teapot", "canyon", "library",
    "falcon", "anchor", "meadow", "compass", "velvet", "mirror", "pepper", "marble", "castle", "ribbon",
)  # fmt: skip
_PACKED = 9


@dataclass(frozen=True)
class Question:
    """Ask for one number. back: how many turns before the last one it was stated."""

    thing: str
    number: str
    position: str
    back: int


@dataclass(frozen=True)
class Dialogue:
    """Hold the user's messages before the last turn, the text of the last turn, and the questions that may be asked in it."""

    messages: list[str]
    last: str
    questions: list[Question]


def make_dialogue(tokenizer: Any, tokens: int, seed: int) -> Dialogue:
    """Return a dialogue of about ``tokens`` tokens over a part of the novel that the seed chooses."""
    draw = random.Random(seed)
    sentences = re.split(r"(?<=[.;!?]) +|\n+", text("prose", seed % 2))
    sentences = [each for each in sentences if each.strip()]
    things = draw.sample(_THINGS, TURNS * _NEEDLES)
    start = draw.randrange(len(sentences) // 8)
    parts, questions = [], []
    for turn, share in enumerate(_SHARES):
        part, held = [], 0
        while held < share * (tokens - 300) and start < len(sentences):
            part.append(sentences[start])
            held += len(tokenizer.encode(sentences[start] + " ", add_special_tokens=False))
            start += 1
        for thing in things[turn * _NEEDLES : (turn + 1) * _NEEDLES]:
            number = str(draw.randrange(10_000, 100_000))
            part.insert(draw.randrange(len(part) + 1), f"The magic number of the {thing} is {number}.")
            questions += [Question(thing, number, position, TURNS - 1 - turn) for position in POSITIONS]
        parts.append(" ".join(part))
    return Dialogue([f"Read this part of a book.\n\n{each}" for each in parts[:-1]], parts[-1], questions)


def last_message(dialogue: Dialogue, question: Question) -> str:
    """Return the last turn's message, with the question at its place."""
    asked = f"What is the magic number of the {question.thing}?"
    if question.position == "begin":
        return f"{asked} Look for it in the book, which goes on here.\n\n{dialogue.last}"
    if question.position == "end":
        return f"Read this part of a book.\n\n{dialogue.last}\n\n{asked}"
    sentences = dialogue.last.split(". ")
    half = len(sentences) // 2
    return f"Read this part of a book.\n\n{'. '.join(sentences[:half])}.\n\n{asked}\n\n{'. '.join(sentences[half:])}"


@dataclass
class _Digits:
    """Give the tokens of an answer, and note which of its digits were the likeliest token."""

    tokens: Sequence[int]
    counted: Sequence[bool]
    right: list[bool]
    given: int = 0

    def __call__(self, logits: Tensor) -> int:
        token = self.tokens[self.given]
        if self.counted[self.given]:
            self.right.append(int(logits.argmax()) == token)
        self.given += 1
        return token


class Asking:
    """Hold a dialogue on a model and its stacks, the turns before the last one read under each.

    replays: read all turns densely once for all stacks, whose prefill must be dense; else each stack reads by its own prefill.
    """

    def __init__(
        self,
        model: TransformersModel,
        tokenizer: Any,
        dialogue: Dialogue,
        stacks: Mapping[str, PolicyStack],
        *,
        replays: bool = True,
    ) -> None:
        self.tokenizer, self.dialogue = tokenizer, dialogue
        self._before = TurnRecorder(model) if replays else None
        turns: list[list[int]] = []
        self._messages: list[dict[str, str]] = []
        self._known = 0
        for each in dialogue.messages:
            self._messages.append({"role": "user", "content": each})
            turns.append(self._new(self._messages))
            self._known += len(turns[-1])
            if self._before:
                self._before.read(turns[-1])
            self._messages.append({"role": "assistant", "content": _READ})
        self._model = ReplayModel(model, self._before.recording() if self._before else None)
        self._engine = TokenEngine(self._model, load_stack("dense"), policy_timeout_s=None)
        self._sessions: dict[str, Session] = {}
        for name, stack in stacks.items():
            self._sessions[name] = self._engine.session(replayed(stack) if replays else stack)
            for turn in turns:
                self._engine.prefill(self._sessions[name], turn)

    def _new(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Return what a conversation adds to the turns that were read."""
        whole = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        ids = self.tokenizer.encode(whole, add_special_tokens=False)
        return list(ids[self._known :])

    def ask(self, question: Question) -> Iterator[tuple[str, dict[str, Any]]]:
        """Ask one question under each stack, on a fork of its session."""
        last = self._new([*self._messages, {"role": "user", "content": last_message(self.dialogue, question)}])
        if self._before:
            recorder = self._before.fork()
            recorder.read(last)
            self._model.recording = recorder.recording()
        answer = f"The magic number of the {question.thing} is {question.number}."
        ids = self.tokenizer.encode(answer, add_special_tokens=False)
        digits = [self.tokenizer.decode([each]).strip().isdigit() for each in ids]
        while not digits[-1]:  # what comes after the last digit is not compared
            del ids[-1], digits[-1]
        names = list(self._sessions)
        for start in range(0, len(names), _PACKED):
            running: dict[str, tuple[Turn, _Digits]] = {}
            for name in names[start : start + _PACKED]:
                session, choose = self._sessions[name].fork(), _Digits(ids, digits, [])
                running[name] = self._engine.begin(session, last, choose, max_new_tokens=len(ids)), choose
            decode_together(self._engine, [turn for turn, _ in running.values()])
            for name, (turn, choose) in running.items():
                if turn.error is not None:
                    raise turn.error
                attended = turn.session.stats.means["attended_fraction"]
                yield (
                    name,
                    {
                        "position": question.position,
                        "back": question.back,
                        "right": sum(choose.right),
                        "of": len(choose.right),
                        "attended": round(attended.total / max(attended.weight, 1), 4) if attended.weight else None,
                    }
                    | ({} if self._before else {"cells": prefill_figures(turn.session.stats)["cells"]}),
                )
                turn.session.close()
            running.clear()
            gc.collect()


def measure(
    model: TransformersModel,
    tokenizer: Any,
    tokens: int,
    seed: int,
    stacks: Mapping[str, PolicyStack],
    *,
    replays: bool = True,
) -> dict[str, list[dict[str, Any]]]:
    """Return by stack what became of every question of a dialogue. One number of each turn is asked for at every position.

    replays: read densely, once for all stacks; else each stack reads by its own prefill.
    """
    dialogue = make_dialogue(tokenizer, tokens, seed)
    asking = Asking(model, tokenizer, dialogue, stacks, replays=replays)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in stacks}
    seen: set[tuple[str, int]] = set()
    for question in dialogue.questions:
        if (question.position, question.back) in seen:
            continue
        seen.add((question.position, question.back))
        with torch.no_grad():
            for name, answer in asking.ask(question):
                found[name].append(answer)
    return found
