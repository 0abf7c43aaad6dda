"""Every policy, and every pair of them, in conversations of three turns with two families of models."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from loopserve.core.engine.engine import TokenEngine
from loopserve.core.engine.session import Session
from loopserve.core.kv.selection import Retention
from loopserve.core.policy.registry import Kind, Registration
from loopserve.core.stack.stack import pairs
from tests.policies.conversations import ANSWER, DENSE, FAMILIES, FULL, TURNS, answers, conversation, engine
from tests.policies.small import COMPRESSORS, SPARSIFIERS, label, registered, spec, wraps

KEPT = [(each, Retention.KEEP) for each in COMPRESSORS]
EVICTED = [(each, Retention.EVICT) for each in COMPRESSORS if Retention.EVICT in each.capabilities.retentions]
DECODING = [pytest.param(*each, id=f"{each[0].name}-{each[1]}") for each in KEPT + EVICTED]
PAIRS = [each for each in pairs(registered()) if each.reason is None]
# Options under which a policy leaves nothing out, however long the conversation.
WIDEST: dict[str, dict[str, Any]] = {
    "prefill a_shape": {"local_window": 4096},
    "prefill tri_shape": {"last_rows": 4096},
    "prefill minference": {"vertical_size": 4096},
    "prefill flashprefill": {"local_window": 4096},
    "prefill duo": {"retrieval_share": 1.0},
    "prefill flexprefill": {"gamma": 1.0},
    "prefill xattention": {"threshold": 1.0},
    "prefill topk_blocks": {"top_p": 1.0},
    "prefill sample_attention": {"local_share": 1.0},
    "prefill static_lines": {"local_window": 4096},
    "prefill loopserve": {"alpha": 1.0},
    "decode twilight": {"top_p": 1.0},
    "decode recover_alpha": {"alpha": 1.0},
    "decode duo": {"retrieval_share": 1.0},
    "decode rocketkv_mt": {"budget": 4096, "filter_budget": 4096},
}


def sides(policy: Registration, written: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(prefill, decode) of a stack with one policy beside one that leaves everything in."""
    return (written, FULL) if policy.kind is Kind.PREFILL else (DENSE, written)


def widest(policy: Registration) -> dict[str, Any]:
    if wraps(policy):
        written = spec(policy)
        return {**written, "inner": {**written["inner"], "budget": 4096}} | WIDEST.get(label(policy), {})
    default = {"budget": 4096} if "budget" in policy.config.model_fields else {}
    return spec(policy) | WIDEST.get(label(policy), default)


def assert_two_at_once_equal_two_alone(served: TokenEngine) -> list[Session]:
    """Two conversations, a turn of one and then a turn of the other, bit by bit as each alone; their sessions."""
    alone = [conversation(served, seed=seed) for seed in (0, 1)]
    sessions = [served.session() for _ in alone]
    talks = [answers(served, session, seed) for seed, session in enumerate(sessions)]
    outputs: list[list[torch.Tensor]] = [[], []]
    for _ in TURNS:
        for turns, talk in zip(outputs, talks, strict=True):
            turns.append(next(talk))
    for solo, turns in zip(alone, outputs, strict=True):
        assert torch.isfinite(solo).all()
        assert torch.equal(solo, torch.cat(turns))
    return sessions


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("policy", "retention"), DECODING)
def test_decode_policies_hold_three_turns_and_two_conversations_at_once(
    policy: Registration, retention: Retention, family: str
) -> None:
    served = engine(family, *sides(policy, spec(policy, retention)))
    for session in assert_two_at_once_equal_two_alone(served):
        assert session.cache.seen == sum(TURNS) + len(TURNS) * ANSWER - 1  # the last output is not computed yet
        alone = policy.name == "omnikv" and family == "gemma2"  # one full layer: nobody to share a selection with
        assert served.stack.is_dense or alone or session.turns[-1].compressed_steps > 0


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("policy", SPARSIFIERS, ids=label)
def test_prefill_policies_hold_three_turns_and_two_conversations_at_once(policy: Registration, family: str) -> None:
    served = engine(family, *sides(policy, spec(policy)))
    for session in assert_two_at_once_equal_two_alone(served):
        if not served.stack.is_dense:
            later = session.turns[-1].means["prefill_cell_density"]
            assert later.value < 1  # turns after the first are sparse too


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("policy", [*SPARSIFIERS, *COMPRESSORS], ids=label)
def test_the_widest_setting_is_dense(policy: Registration, family: str) -> None:
    dense = conversation(engine(family, DENSE, FULL))
    wide = conversation(engine(family, *sides(policy, widest(policy))))
    assert torch.allclose(wide, dense, atol=2e-4)
    assert torch.equal(wide.argmax(-1), dense.argmax(-1))


@pytest.mark.parametrize("policy", SPARSIFIERS, ids=label)
def test_prefill_policies_take_a_turn_in_chunks(policy: Registration) -> None:
    served = engine("llama", *sides(policy, spec(policy)), chunk_tokens=17)
    assert torch.isfinite(conversation(served)).all()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("prefill", [each.name for each in SPARSIFIERS])
def test_every_pair_holds_three_turns(prefill: str, family: str) -> None:
    written = {(each.kind, each.name): each for each in [*SPARSIFIERS, *COMPRESSORS]}
    for pair in [each for each in PAIRS if each.prefill == prefill]:
        first, second = written[Kind.PREFILL, prefill], written[Kind.DECODE, pair.decode]
        served = engine(family, spec(first), spec(second, pair.retention))
        outputs = torch.cat(list(answers(served, served.session(), turns=(33, 2, 13), answer=3)))
        assert torch.isfinite(outputs).all(), f"{prefill} x {pair.decode} ({pair.retention})"
