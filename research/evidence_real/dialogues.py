"""Conversations of several turns: the user gives a text piece by piece, every answer is the piece that follows, teacher-forced."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from loopserve.api import load_stack
from loopserve.core.engine.engine import CHUNK_TOKENS, TokenEngine
from loopserve.core.engine.session import Session
from loopserve.core.stack.stack import PolicyStack
from loopserve.models.bridge import TransformersModel
from research.evidence_real.comparison import Forced, Reference
from research.evidence_real.costs import costs
from research.evidence_real.replay import all_logits, decode_together
from research.evidence_real.texts import REQUEST, template_of_turns

TURNS = 4
ANSWER = 65
"""Tokens of an answer; the first is chosen from the prefill's logits, which are not compared."""
_PACKED = 8


def turns_of(tokenizer: Any, content: str, tokens: int, turns: int = TURNS) -> list[tuple[list[int], list[int]]]:
    """Return for each turn the tokens that it adds, and its answer. The conversation has about ``tokens`` tokens."""
    before, after, between = template_of_turns(tokenizer, REQUEST)
    ids = tokenizer.encode(content, add_special_tokens=False, verbose=False)
    piece = tokens // turns - ANSWER - len(after) - len(between)
    found, place = [], 0
    for turn in range(turns):
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
    model: TransformersModel,
    tokenizer: Any,
    content: str,
    tokens: int,
    stacks: Mapping[str, PolicyStack],
    count: int = TURNS,
    *,
    chunk_tokens: int = CHUNK_TOKENS,
) -> dict[str, list[dict[str, Any]]]:
    """Return by stack and turn how its answer's predictions agree with dense attention's. count: turns of the conversation.

    chunk_tokens: longest piece of a prefill.
    """
    turns = turns_of(tokenizer, content, tokens, count)
    known = references(model, turns)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in stacks}
    names = list(stacks)
    for start in range(0, len(names), _PACKED):
        engine = TokenEngine(model, load_stack("dense"), chunk_tokens=chunk_tokens, policy_timeout_s=None)
        sessions: dict[str, Session] = {name: engine.session(stacks[name]) for name in names[start : start + _PACKED]}
        for (given, answer), reference in zip(turns, known, strict=True):
            running = {}
            for name, session in sessions.items():
                choose = Forced(answer, reference)
                running[name] = engine.begin(session, given, choose, max_new_tokens=len(answer)), choose
            decode_together(engine, [turn for turn, _ in running.values()])
            for name, (turn, choose) in running.items():
                if turn.error is not None:
                    raise turn.error
                found[name].append(choose.found() | {"costs": costs(turn)})
        for session in sessions.values():
            session.close()
        sessions.clear()
        gc.collect()
    return found
