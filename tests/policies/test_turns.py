"""A turn begins: what only the last one needed is let go, so that copies to go back to stay small and nothing leaks into the turn."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch

from loopserve.core.registry import Registration
from loopserve.policies.decode.expected_attention import ExpectedAttentionDecode
from loopserve.testing.scripted import ScriptedConversation
from tests.policies.conversations import DENSE, answers, conversation, engine
from tests.policies.small import COMPRESSORS, label, spec

SHORT_TURNS = (41, 9, 9, 9, 9, 9)
REMEMBER = {"h2o", "streaming_llm"}  # sums over all turns; the number of heads of each layer


def tensor_bytes(value: Any, met: set[int]) -> int:
    """Bytes of all tensors that a value leads to, each counted once."""
    if id(value) in met or isinstance(value, type):
        return 0
    met.add(id(value))
    if isinstance(value, torch.Tensor):
        return value.untyped_storage().nbytes()
    return sum(tensor_bytes(part, met) for part in gc.get_referents(value))


@pytest.mark.parametrize("policy", COMPRESSORS, ids=label)
def test_what_is_kept_for_undo_does_not_hold_old_answers(policy: Registration) -> None:
    served = engine("llama", DENSE, spec(policy))
    session = served.session()
    held = []
    for _ in answers(served, session, turns=SHORT_TURNS):
        held.append(tensor_bytes([start.states for start in session._starts], set()))
    if policy.name in REMEMBER:
        assert held[-1] <= 8 * sum(len(session.tokens) for _ in held) * len(session.policies) * 4
    else:
        assert held == [0] * len(held)


def test_two_turns_are_taken_back_and_held_again() -> None:
    for name in ("loopserve", "h2o", "rocketkv_mt", "recover_alpha"):
        served = engine("llama", DENSE, spec(_named(name)))
        session = served.session()
        first = conversation(served, session)
        for _ in range(3):
            session.undo()
        torch.testing.assert_close(conversation(served, session), first, rtol=0, atol=0)


def test_expected_attention_does_not_take_an_uncompressed_turns_queries_for_this_one() -> None:
    """The first turn fits the budget, so nothing was ranked in it."""
    policy = ExpectedAttentionDecode(ExpectedAttentionDecode.Config(budget=24, recent_window=4, future=16))
    source = torch.Generator().manual_seed(4)
    queries, keys = (torch.randn(1, heads, 80, 16, generator=source) for heads in (4, 2))
    chosen = []
    for forgets in (False, True):
        talk = ScriptedConversation(policy, queries, keys)
        talk.prefill(20)
        if forgets:
            talk.state = policy.init_state()
        talk.prefill(60)
        chosen.append(talk.selections[-1][0].indices)
    assert torch.equal(*chosen)


def _named(name: str) -> Registration:
    return next(each for each in COMPRESSORS if each.name == name)
