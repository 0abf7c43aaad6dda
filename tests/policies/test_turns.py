"""A turn ends: what only it needed is let go, so that copies to go back to stay small and nothing leaks into the turn."""

from __future__ import annotations

import gc
from typing import Any, ClassVar
from unittest.mock import patch

import pytest
import torch

from loopserve.core.engine.engine import TokenEngine
from loopserve.core.engine.sampling import Sampler, SamplingConfig
from loopserve.core.engine.session import Session
from loopserve.core.policy.interfaces import AttentionInputs, DecodeCompressor, Phase, Step
from loopserve.core.policy.registry import Registration
from loopserve.core.stack.stack import PolicyStack
from loopserve.models.bridge import TransformersModel
from loopserve.policies.decode.expected_attention import ExpectedAttentionDecode
from loopserve.policies.decode.loopserve.policy import LoopServeDecode
from loopserve.policies.prefill.dense import DensePrefill
from loopserve.testing.scripted import ScriptedConversation
from tests.policies.conversations import DENSE, conversation, engine, model, prompts
from tests.policies.small import COMPRESSORS, label, spec

SHORT_TURNS = (41, 9, 9, 9, 9, 9)
# sums over all turns; the heads of each layer; what turns have kept; the kind of each head
REMEMBER = {"h2o", "streaming_llm", "flowkv", "kvzip", "duo"}


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
    for prompt in prompts(0, SHORT_TURNS):
        list(served.generate(session, prompt, SamplingConfig(max_new_tokens=6), frozenset()))
        held.append(tensor_bytes([start.states for start in session._starts], set()))
    if policy.name in REMEMBER:
        assert held[-1] <= 8 * sum(len(session.tokens) for _ in held) * len(session.slots.by_layer) * 4
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


class Counting(DecodeCompressor[dict[str, int]]):
    """Counts the turns it reads and those that were reported as over."""

    name: ClassVar[str] = "counting"
    paper: ClassVar[str] = ""

    def init_state(self) -> dict[str, int]:
        return {"read": 0, "ended": 0}

    def end_turn(self, state: dict[str, int]) -> None:
        state["ended"] += 1

    def after_forward(self, step: Step, state: dict[str, int]) -> None:
        state["read"] += step.phase is Phase.PREFILL and step.final
        assert state["read"] - state["ended"] == 1


def counted(**options: Any) -> tuple[TokenEngine, Session]:
    stack = PolicyStack("counting", DensePrefill(), Counting())
    served = TokenEngine(TransformersModel(model("llama")), stack, **options)
    return served, served.session()


def say(served: TokenEngine, session: Session, seed: int = 0, **sampling: Any) -> list[int]:
    said = SamplingConfig(max_new_tokens=4, **sampling)
    return list(served.generate(session, prompts(seed, (12,))[0], said, frozenset()))


def state_of(session: Session) -> dict[str, int]:
    return next(state for state in session.states.values() if "read" in state)


def test_each_turn_ends_once_whatever_happens_between() -> None:
    served, session = counted()
    say(served, session)
    assert state_of(session) == {"read": 1, "ended": 1}
    for _ in range(3):  # retries
        say(served, session, seed=1)
        session.undo()
    assert state_of(session) == {"read": 1, "ended": 1}
    broken = served.generate(session, prompts(2, (12,))[0], SamplingConfig(max_new_tokens=4), frozenset())
    next(broken)
    broken.close()
    assert state_of(session) == {"read": 1, "ended": 1}
    served.prefill(session, prompts(3, (12,))[0], max_new_tokens=4)  # never answered
    assert state_of(session) == {"read": 2, "ended": 1}
    other = session.fork()
    say(served, session, seed=4)
    say(served, other, seed=5)
    assert state_of(session) == state_of(other) == {"read": 3, "ended": 3}
    session.undo()
    assert state_of(session) == {"read": 2, "ended": 1}
    say(served, session, seed=4)
    assert state_of(session) == {"read": 3, "ended": 3}


@pytest.mark.parametrize("name", ["loopserve", "rocketkv_mt", "recover_alpha", "expected_attention", "snapkv"])
def test_a_turn_that_waits_for_its_answer_survives_another_that_breaks_off(name: str) -> None:
    answered = []
    for broken in (False, True):
        served = engine("llama", DENSE, spec(_named(name)))
        session = served.session()
        said = SamplingConfig(max_new_tokens=8)
        logits = served.prefill(session, prompts(0, (41,))[0], max_new_tokens=8)
        if broken:
            other = served.generate(session, prompts(1, (20,))[0], said, frozenset())
            next(other)
            other.close()
        answered.append(list(served.decode(session, logits, Sampler(said), frozenset(), 8)))
        assert session.stats.compressed_steps > 0
    assert answered[0] == answered[1]


def test_a_turn_served_without_a_policy_and_taken_back_leaves_the_policys_state() -> None:
    served, session = counted(on_policy_fault="dense")
    say(served, session)
    before = dict(state_of(session))
    with patch.object(served.guard, "skips", lambda _: True):
        say(served, session, seed=1)
    session.undo()
    assert state_of(session) == before
    say(served, session, seed=1)
    assert state_of(session) == {"read": 2, "ended": 2} and session.stats.as_dict()["faults"] == 0


def test_short_conversations_are_not_shown_to_it_in_decoding() -> None:
    options = {
        "policy": "loopserve",
        "budget": 24,
        "dense_below": 4,
        "key_bits": 2,
        "page_budget": 8,
        "recent_window": 4,
    }
    served = engine("llama", DENSE, options)
    session = served.session()
    shown: list[tuple[str, int]] = []

    def watched(name: str) -> Any:
        method = getattr(LoopServeDecode, name)

        def call(self: LoopServeDecode, inputs: AttentionInputs, state: Any) -> Any:
            if inputs.phase is Phase.DECODE:
                shown.append((name, inputs.total_tokens))
            return method(self, inputs, state)

        return patch.object(LoopServeDecode, name, call)

    with watched("before_attention"), watched("after_attention"):
        list(served.generate(session, prompts(0, (60,))[0], SamplingConfig(max_new_tokens=40), frozenset()))
    assert {name for name, _ in shown} == {"before_attention", "after_attention"}
    assert {total for _, total in shown} == {97, 98, 99}


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
