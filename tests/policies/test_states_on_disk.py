"""States written as JSON and tensors go on as if they had never been written, under every policy and every plugin."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
import torch
from loopserve_keydiff import BareKeyDiffDecode
from loopserve_kvpress import ScorerDecode
from loopserve_star import StarPrefill

from loopserve.core.engine.engine import TokenEngine
from loopserve.core.engine.sampling import SamplingConfig
from loopserve.core.engine.session import Session
from loopserve.core.kv.selection import Retention
from loopserve.core.policy.interfaces import AttentionInputs, DecodeCompressor, PrefillSparsifier
from loopserve.core.stack.stack import PolicyStack
from loopserve.models.bridge import TransformersModel
from loopserve.policies.decode.full import FullDecode
from loopserve.policies.prefill.dense import DensePrefill
from tests.policies.conversations import model
from tests.policies.small import COMPRESSORS, SPARSIFIERS, built, label, small, spec

VOCABULARY = 60
LOOPSERVE = next(each for each in COMPRESSORS if each.name == "loopserve")
OTHER_OPTIONS: list[dict[str, Any]] = [
    {"trigger": "drift", "page_budget": 6, "key_bits": 4, "page": 8, "drift_threshold": 0.95},
    {"page_budget": 6, "key_bits": 8, "page": 8, "rescore": "codes"},
    {"page_budget": 6, "key_bits": 8, "page": 8, "page_budget_rule": "threshold", "scope": "all"},
    {"second_hop": "kept", "share": "none", "scope": "all"},
    {"first_block": "dense", "share": "layer_groups", "layer_group": 1},
    {"dense_below": 2.0, "scope": "all"},
    {"pool": "active", "dense_below": 2.0},
]


class _LongKeys:
    """A scorer with the interface of kvpress."""

    def score(self, module: Any, hidden_states: Any, keys: torch.Tensor, *rest: Any) -> torch.Tensor:
        return keys.norm(dim=-1)


class LongKeys(ScorerDecode):
    """Keeps the longest keys by way of the kvpress adapter."""

    name, paper = "long_keys", ""

    @property
    def scorer(self) -> Any:
        return _LongKeys()


def cases() -> list[Any]:
    """Every policy once as it keeps and once as it evicts, beside a dense or full one."""
    found = [(label(each), (small(each), FullDecode())) for each in SPARSIFIERS]
    for each in COMPRESSORS:
        for retention in Retention:
            if retention in each.capabilities.retentions:
                found.append((f"{each.name}-{retention}", (DensePrefill(), built(each.kind, spec(each, retention)))))
    for options in OTHER_OPTIONS:
        found.append((f"loopserve-{options}", (DensePrefill(), small(LOOPSERVE, **options))))
    for retention in Retention:
        options = {"budget": 24, "retention": retention, "recent_window": 4}
        found.append((f"kvpress-{retention}", (DensePrefill(), LongKeys(LongKeys.Config(**options)))))
        found.append(
            (f"keydiff_bare-{retention}", (DensePrefill(), BareKeyDiffDecode(BareKeyDiffDecode.Config(**options))))
        )
    star = StarPrefill(StarPrefill.Config(block_size=8, anchor_size=4, last_rows=4))
    return [pytest.param(*each, id=name) for name, each in [*found, ("star", (star, FullDecode()))]]


def engine(prefill: PrefillSparsifier, decode: DecodeCompressor[Any], **options: Any) -> TokenEngine:
    return TokenEngine(TransformersModel(model("llama")), PolicyStack("case", prefill, decode), **options)


def written_and_read(session: Session) -> None:
    """Write all states as a file would hold them, and go on with what is read of it."""
    packed, problems = session.pack_states()
    assert not problems
    rested = {slot for slot in session.slots.policies if slot in session.states and session.is_enabled(slot)}
    assert set(packed) == rested
    text = json.dumps({slot: tree for slot, (tree, _) in packed.items()}, allow_nan=False)
    read = {slot: (tree, packed[slot][1]) for slot, tree in json.loads(text).items()}
    assert session.restore_states(read) == {}
    assert not any(_has_views(state) for state in session.states.values())


def _has_views(state: Any) -> bool:
    inside = vars(state).values() if hasattr(state, "__dict__") else ()
    return any(
        isinstance(each, dict) and any(isinstance(part, AttentionInputs) for part in each.values()) for each in inside
    )


def turns(seed: int) -> list[tuple[list[int], int]]:
    source = random.Random(seed)
    lengths = [source.choice([30, 45, 60]), source.choice([1, 2, 12]), source.choice([1, 20, 40])]
    return [([source.randrange(3, VOCABULARY) for _ in range(length)], source.randint(1, 9)) for length in lengths]


def converse(served: TokenEngine, seed: int, write: bool) -> list[torch.Tensor]:
    """The logits of every output; ``write``: with the states on disk between any two steps that a caller can make."""
    session, found = served.session(), []

    def choose(logits: torch.Tensor) -> int:
        found.append(logits)
        return int(logits.argmax())

    for number, (tokens, answer) in enumerate(turns(seed)):
        if number == 1:  # read first, answered later: a session that waits for its answer is at rest, too
            logits = served.prefill(session, tokens, max_new_tokens=answer)
            if write:
                written_and_read(session)
            list(served.decode(session, logits, choose, max_new_tokens=answer))
        else:
            list(served.generate(session, tokens, choose, max_new_tokens=answer))
        if write:
            written_and_read(session)
    return found


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(("prefill", "decode"), cases())
def test_the_next_turn_is_bit_equal(prefill: PrefillSparsifier, decode: DecodeCompressor[Any], seed: int) -> None:
    served = engine(prefill, decode, chunk_tokens=23)
    plain, written = (converse(served, seed, write) for write in (False, True))
    assert len(plain) == len(written)
    assert all(torch.equal(one, other) for one, other in zip(plain, written, strict=True))


class Unwritable(FullDecode):
    """Keeps a function in its state."""

    name, paper = "unwritable", ""

    def init_state(self) -> Any:
        return {"call": print}


def test_a_state_that_cannot_be_written_is_named_and_begun_anew() -> None:
    served = engine(DensePrefill(), Unwritable())
    session = served.session()
    list(served.generate(session, [5, 6], SamplingConfig(max_new_tokens=2)))
    packed, problems = session.pack_states()
    assert set(packed) == {"prefill:0"}
    assert problems["decode:0"].startswith("decode:0 (unwritable): state['call'] is a builtins.builtin_function")
    assert session.restore_states(packed) == {}
    list(served.generate(session, [7], SamplingConfig(max_new_tokens=2)))
    assert session.states["decode:0"] == {"call": print}


def test_states_of_another_stack_are_refused_slot_by_slot() -> None:
    served = engine(DensePrefill(), small(LOOPSERVE))
    session = served.session()
    list(served.generate(session, list(range(3, 50)), SamplingConfig(max_new_tokens=2)))
    packed, _ = session.pack_states()
    other = engine(DensePrefill(), FullDecode()).session()
    problems = other.restore_states({**packed, "decode:7": ([], [])})
    assert "no type 'LoopServeState'" in problems["decode:0"] and "no slot 'decode:7'" in problems["decode:7"]
    assert set(other.states) == {"prefill:0"}


def test_a_session_in_the_middle_of_an_answer_is_not_written() -> None:
    served = engine(DensePrefill(), FullDecode())
    session = served.session()
    stream = served.generate(session, [5, 6], SamplingConfig(max_new_tokens=4))
    next(stream)
    with pytest.raises(Exception, match="an answer is still being written"):
        session.pack_states()
    stream.close()
    session.pack_states()  # it rests again
