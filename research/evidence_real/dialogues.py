"""Conversations of several turns: the user gives a text piece by piece, every answer is the piece that follows, teacher-forced."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from loopserve.api import load_stack
from loopserve.core.engine.engine import TokenEngine
from loopserve.core.engine.session import Session
from loopserve.core.stack.stack import PolicyStack
from loopserve.models.bridge import TransformersModel
from research.evidence_real.agreement import Forced, Reference, costs
from research.evidence_real.replay import all_logits
from research.evidence_real.texts import REQUEST, template_of_turns, text

TURNS = 4
ANSWER = 65
"""Tokens of an answer; the first is chosen from the prefill's logits, which are not compared."""
_PACKED = 8


def turns_of(tokenizer: Any, content: str, tokens: int) -> list[tuple[list[int], list[int]]]:
    """Return for each turn the tokens that it adds, and its answer. The conversation has about ``tokens`` tokens."""
    before, after, between = template_of_turns(tokenizer, REQUEST)
    ids = tokenizer.encode(content, add_special_tokens=False, verbose=False)
    piece = tokens // TURNS - ANSWER - len(after) - len(between)
    found, place = [], 0
    for turn in range(TURNS):
        given, place = ids[place : place + piece], place + piece
        answer, place = ids[place : place + ANSWER], place + ANSWER
        found.append(([*(between if turn else before), *given, *after], answer))
    if len(found[-1][1]) < ANSWER:
        raise ValueError(f"the text is shorter than {tokens} tokens")
    return found


def references(model: TransformersModel, turns: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Reference]:
    """Return what dense attention predicts after each token of each answer."""
    engine = TokenEngine(model, load_stack("dense"))
    session = engine.session()
    found = []
    for given, answer in turns:
        engine.prefill(session, list(given))
        with all_logits(model) as logits:
            engine.prefill(session, list(answer))
        found.append(Reference(torch.cat(logits)[:-1], list(answer[1:])))
    session.close()
    return found


def measure(
    model: TransformersModel, tokenizer: Any, kind: str, number: int, tokens: int, stacks: Mapping[str, PolicyStack]
) -> dict[str, list[dict[str, Any]]]:
    """Return by stack and turn how its answer's predictions agree with dense attention's."""
    turns = turns_of(tokenizer, text(kind, number), tokens)
    known = references(model, turns)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in stacks}
    names = list(stacks)
    for start in range(0, len(names), _PACKED):
        engine = TokenEngine(model, load_stack("dense"), policy_timeout_s=None)
        sessions: dict[str, Session] = {name: engine.session(stacks[name]) for name in names[start : start + _PACKED]}
        for (given, answer), reference in zip(turns, known, strict=True):
            running = {}
            for name, session in sessions.items():
                choose = Forced(answer, reference)
                turn = engine.begin(session, given, choose, max_new_tokens=len(answer))
                while not turn.output and turn.error is None:
                    engine.run_pass([turn])
                running[name] = turn, choose
            while waiting := [turn for turn, _ in running.values() if not turn.finished]:
                engine.run_pass(waiting)
            for name, (turn, choose) in running.items():
                if turn.error is not None:
                    raise turn.error
                found[name].append(choose.found() | {"costs": costs(turn)})
        for session in sessions.values():
            session.close()
        sessions.clear()
        gc.collect()
    return found
