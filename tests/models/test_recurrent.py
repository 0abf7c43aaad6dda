"""A recurrent state follows its session through fork, undo, cancel, failure, shared passes, disk and ``apply``."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

import loopserve
from loopserve.core.engine.engine import TokenEngine
from loopserve.core.engine.ledger import Ledger
from loopserve.core.engine.policy_states import RECURRENT as RECURRENT_STATES
from loopserve.core.engine.session import Session
from loopserve.core.errors import ConfigError, ModelError
from loopserve.core.kv.cache import bytes_of_states
from loopserve.core.policy.base import Capabilities
from loopserve.core.policy.interfaces import DecodeCompressor, Observation, Phase
from loopserve.core.stack.stack import PolicyStack
from loopserve.models.carried import Carried
from loopserve.models.tiny import RECURRENT, VOCABULARY, tiny_model
from loopserve.policies.prefill.dense import DensePrefill
from loopserve.serve.kv_files import LoadedPairs
from tests.models.conftest import GreedySteps, engine_for

pytestmark = pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated:FutureWarning")

FEW = (
    "qwen3_next",
    "lfm2",
    "falcon_h1",
    "jamba",
)  # delta rule, convolution, pairs beside states, states that are dropped
EVICTING = {
    "prefill": {"policy": "dense"},
    "decode": {
        "policy": "snapkv",
        "budget": 16,
        "window": 4,
        "sink_tokens": 1,
        "recent_window": 4,
        "retention": "evict",
    },
}


def tokens(seed: int, count: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (count,), generator=generator).tolist()


FIRST, SECOND, THIRD = tokens(1, 33), tokens(2, 12), tokens(3, 19)


def turn(engine: TokenEngine, session: Session, prompt: list[int]) -> torch.Tensor:
    seen = GreedySteps()
    list(engine.generate(session, prompt, seen, max_new_tokens=5))
    return torch.stack(seen.logits)


def after(engine: TokenEngine, *prompts: list[int]) -> torch.Tensor:
    """The logits of the last turn of a conversation without detours."""
    session = engine.session()
    return [turn(engine, session, prompt) for prompt in prompts][-1]


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("stack", ["dense", EVICTING], ids=["dense", "evicting"])
@pytest.mark.parametrize("family", RECURRENT)
def test_a_fork_goes_its_own_way(family: str, stack: Any) -> None:
    engine = engine_for(tiny_model(family), stack)
    session = engine.session()
    turn(engine, session, FIRST)
    other = session.fork()
    close(turn(engine, other, SECOND), after(engine, FIRST, SECOND))
    close(turn(engine, session, THIRD), after(engine, FIRST, THIRD))


@pytest.mark.parametrize("stack", ["dense", EVICTING], ids=["dense", "evicting"])
@pytest.mark.parametrize("family", RECURRENT)
def test_undo_restores_the_state(family: str, stack: Any) -> None:
    engine = engine_for(tiny_model(family), stack)
    session = engine.session()
    for prompt in (FIRST, SECOND):
        turn(engine, session, prompt)
    session.undo()
    close(turn(engine, session, THIRD), after(engine, FIRST, THIRD))


def test_an_undo_beyond_the_depth_computes_anew() -> None:
    engine = engine_for(tiny_model("qwen3_next"), "dense", undo_depth=1)
    session = engine.session()
    for prompt in (FIRST, SECOND, THIRD):
        turn(engine, session, prompt)
    kept = bytes_of_states(session.cache.recurrent)
    assert session.copied_state_bytes == kept  # one copy, though three turns can be taken back
    session.undo()
    session.undo()
    assert session.cache.seen == 0
    assert not session.cache.recurrent
    close(turn(engine, session, THIRD), after(engine, FIRST, THIRD))


def leaves(engine: TokenEngine, session: Session) -> None:
    answer = engine.generate(session, SECOND, GreedySteps(), max_new_tokens=5)
    next(answer)
    next(answer)
    answer.close()


def cancels_its_prefill(engine: TokenEngine, session: Session) -> None:
    running = engine.begin(session, SECOND, GreedySteps(), max_new_tokens=5)
    engine.run_pass([running], [5])
    running.close()


def fails_in_a_layer(engine: TokenEngine, session: Session) -> None:
    last = list(engine.model.model.model.layers)[-1]  # type: ignore[attr-defined]

    def breaks(*_: Any) -> None:
        raise RuntimeError("mine")

    handle = last.register_forward_pre_hook(breaks)
    try:
        with pytest.raises(RuntimeError, match="mine"):
            turn(engine, session, SECOND)
    finally:
        handle.remove()


@pytest.mark.parametrize("way", [leaves, cancels_its_prefill, fails_in_a_layer])
@pytest.mark.parametrize("family", FEW)
def test_a_turn_that_ends_early_leaves_no_trace(family: str, way: Callable[[TokenEngine, Session], None]) -> None:
    engine = engine_for(tiny_model(family), "dense")
    session = engine.session()
    turn(engine, session, FIRST)
    held = {
        layer: {name: each.clone() for name, each in part.items()} for layer, part in session.cache.recurrent.items()
    }
    way(engine, session)
    for layer, part in session.cache.recurrent.items():
        assert all(torch.equal(each, held[layer][name]) for name, each in part.items())
    close(turn(engine, session, THIRD), after(engine, FIRST, THIRD))


def test_an_error_of_one_session_ends_no_other() -> None:
    engine = engine_for(tiny_model("bamba"), "dense")
    sessions = [engine.session() for _ in range(3)]
    seen = [GreedySteps() for _ in sessions]
    turns = [engine.begin(each, FIRST, chosen, max_new_tokens=5) for each, chosen in zip(sessions, seen, strict=True)]
    engine.run_pass(turns)
    sessions[1].cache.recurrent.clear()  # as a defect elsewhere would
    while not all(each.finished for each in turns):
        engine.run_pass([each for each in turns if not each.finished])
    assert [each.error is None for each in turns] == [True, False, True]
    wanted = after(engine, FIRST)
    close(torch.stack(seen[0].logits), wanted)
    close(torch.stack(seen[2].logits), wanted)


@pytest.mark.parametrize("family", RECURRENT)
def test_states_come_back_from_what_was_written(family: str) -> None:
    engine = engine_for(tiny_model(family), "dense")
    session = engine.session()
    turn(engine, session, FIRST)
    packed, problems = session.pack_states()
    assert problems == {}
    written = {slot: (json.loads(json.dumps(tree)), tensors) for slot, (tree, tensors) in packed.items()}
    other = session.fork()
    other.cache.recurrent = {}
    assert other.restore_states(written) == {}
    close(turn(engine, other, SECOND), after(engine, FIRST, SECOND))


def test_a_session_whose_states_cannot_be_read_is_computed_anew() -> None:
    engine = engine_for(tiny_model("lfm2"), "dense")
    session = engine.session()
    turn(engine, session, FIRST)
    packed, _ = session.pack_states()
    for damaged in ({}, {RECURRENT_STATES: ([], [])}, {RECURRENT_STATES: (packed[RECURRENT_STATES][0], [])}):
        other = session.fork()
        assert set(other.restore_states({**packed, **damaged} if damaged else {})) == {RECURRENT_STATES}
        assert other.cache.seen == 0
        close(turn(engine, other, SECOND), after(engine, FIRST, SECOND))


@pytest.mark.parametrize("family", [*FEW, "gemma3n_text"])
def test_pairs_and_states_come_back_after_a_restart(family: str) -> None:
    engine = engine_for(tiny_model(family), "dense")
    session = engine.session()
    turn(engine, session, FIRST)
    stores = [layer.store for layer in session.cache.own_layers]
    pairs = [(each.keys, each.values) for each in stores if each is not None]
    restored = engine.session()
    restored.tokens, restored.turns = list(session.tokens), list(session.turns)
    LoadedPairs(session.cache.seen, pairs, session.pack_states()[0]).restore(restored, torch.device("cpu"))
    assert restored.cache.seen == session.cache.seen
    close(turn(engine, restored, SECOND), after(engine, FIRST, SECOND))


@pytest.mark.parametrize("family", RECURRENT)
def test_the_ledger_counts_the_states(family: str) -> None:
    engine = engine_for(tiny_model(family), "dense")
    session = engine.session()
    ledger = Ledger(1 << 40, 4, lambda: engine.sessions)
    for prompt in (FIRST, SECOND):
        needed = ledger.needed(session, len(prompt), 5)
        turn(engine, session, prompt)
        states = bytes_of_states(session.cache.recurrent)
        assert states == sum(spec.state_bytes for spec in engine.model.layers) > 0
        assert session.allocated_bytes <= needed
    assert session.copied_state_bytes == states  # the first turn began with none
    session.close()
    assert session.allocated_bytes == 0


class Looking(DecodeCompressor[dict[str, Any]]):
    """Asks for rows without saying so."""

    name = "looking"
    paper = ""

    def init_state(self) -> dict[str, Any]:
        return {}

    def after_forward(self, step: Any, state: dict[str, Any]) -> Any:
        return Observation(torch.tensor([step.turn_start])) if step.phase is Phase.PREFILL and step.final else None


class SayingSo(Looking):
    """Asks for rows and says so."""

    name = "saying_so"
    capabilities = Capabilities(observes=True)


def test_stacks_that_compute_rows_again_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="layers 0-1, 3 of this model cannot do"):
        engine_for(tiny_model("qwen3_next"), "loopserve-interval-8")
    with pytest.raises(ConfigError, match="'saying_so'"):
        engine_for(tiny_model("qwen3_next"), PolicyStack("mine", DensePrefill(), SayingSo()))
    served = engine_for(tiny_model("qwen3_next"), PolicyStack("mine", DensePrefill(), Looking()))
    with pytest.raises(loopserve.LoopServeError, match="computed again"):
        turn(served, served.session(), FIRST)
    for stack in ("loopserve", "loopserve-paper", "snapkv", "dense"):
        engine_for(tiny_model("qwen3_next"), stack)


# Under apply.


def batch(*rows: list[int]) -> dict[str, torch.Tensor]:
    ids = torch.tensor(rows)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def answers(model: PreTrainedModel, given: dict[str, torch.Tensor], **options: Any) -> list[list[int]]:
    output = model.generate(**given, max_new_tokens=6, do_sample=False, pad_token_id=0, **options)
    return output.tolist()


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
@pytest.mark.parametrize("family", RECURRENT)
def test_dense_under_apply_equals_plain_generate(family: str, options: dict[str, Any]) -> None:
    model = tiny_model(family)
    given = batch(tokens(4, 23), tokens(5, 23))
    plain = answers(model, given, **options)
    with loopserve.apply(model, "dense"):
        assert answers(model, given, **options) == plain
    assert answers(model, given, **options) == plain


@pytest.mark.parametrize("own", [False, True], ids=["returned", "the caller's"])
@pytest.mark.parametrize("family", FEW)
def test_a_second_turn_under_apply_goes_on_with_the_cache(family: str, own: bool) -> None:
    model = tiny_model(family)
    with loopserve.apply(model, "dense"):
        cache = DynamicCache(config=model.config) if own else None
        first = model.generate(
            **batch(FIRST), max_new_tokens=5, do_sample=False, past_key_values=cache, return_dict_in_generate=True
        )
        row = first.sequences[0].tolist() + SECOND
        found = answers(model, batch(row), past_key_values=cache if own else first.past_key_values)
        assert found == answers(model, batch(row))


def test_padding_is_refused_under_apply() -> None:
    model = tiny_model("qwen3_next")
    given = batch(tokens(4, 23), tokens(5, 23))
    given["attention_mask"][0, :4] = 0
    with loopserve.apply(model, "dense"), pytest.raises(ModelError, match="padding would enter the state"):
        answers(model, given)


def test_only_the_layers_that_drop_their_state_are_computed_token_by_token() -> None:
    for family in RECURRENT:
        model = tiny_model(family)
        before = [each.forward for each in model.modules()]
        engine = engine_for(model, "dense")
        carried: Carried = engine.model.carried  # type: ignore[attr-defined]
        assert bool(carried._stepped) == (family == "jamba")
        turn(engine, engine.session(), FIRST)
        assert [each.forward for each in model.modules()] == before
