"""A turn is read once and answered twice: by the model, and by dictation, through the same decode steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from loopserve.core.engine.engine import TokenEngine
from loopserve.core.engine.sampling import Dictation, Sampler, SamplingConfig
from loopserve.core.engine.session import Session
from loopserve.core.errors import InputError, ModelError
from tests.models.conftest import ANSWER, engine_for, prompts, steps_by_engine

NO_STOP: frozenset[int] = frozenset()
STACKS: dict[str, dict[str, Any]] = {
    "dense": {"prefill": {"policy": "dense"}, "decode": {"policy": "full"}},
    "kept": {"prefill": {"policy": "dense"}, "decode": {"policy": "snapkv", "budget": 20, "window": 8}},
    "evicted": {
        "prefill": {"policy": "dense"},
        "decode": {"policy": "snapkv", "budget": 20, "window": 8, "retention": "evict"},
    },
    "every step": {"prefill": {"policy": "dense"}, "decode": {"policy": "quest", "budget": 16, "page": 4}},
    "loopserve": {
        "prefill": {"policy": "loopserve", "min_new_tokens": 1, "min_total_tokens": 1},
        "decode": {"policy": "loopserve", "budget": 24, "interval": 3, "recent_window": 4, "dense_below": 1},
    },
}


class Noting:
    """Chooses as another does and keeps the logits."""

    def __init__(self, choose: Sampler | Dictation) -> None:
        self.choose = choose
        self.logits: list[torch.Tensor] = []

    def __call__(self, logits: torch.Tensor) -> int:
        self.logits.append(logits)
        return self.choose(logits)


def answer(engine: TokenEngine, session: Session, logits: torch.Tensor, choose: Any) -> list[int]:
    return list(engine.decode(session, logits, choose, NO_STOP, ANSWER))


@pytest.mark.parametrize("name", STACKS)
def test_dictating_the_own_answer_changes_nothing(llama: PreTrainedModel, name: str) -> None:
    engine = engine_for(llama, STACKS[name])
    first, second = prompts()
    own = engine.session()
    logits = engine.prefill(own, first, max_new_tokens=ANSWER)
    other = own.fork()
    free = Noting(Sampler(SamplingConfig()))
    said = answer(engine, own, logits, free)
    forced = Noting(Dictation(said))
    assert answer(engine, other, logits, forced) == said and own.tokens == other.tokens
    assert all(torch.equal(a, b) for a, b in zip(free.logits, forced.logits, strict=True))
    again = [
        list(engine.generate(each, second, SamplingConfig(max_new_tokens=ANSWER), NO_STOP)) for each in (own, other)
    ]
    assert again[0] == again[1]
    assert own.stats.as_dict() | {"ttft_ms": 0, "tpot_ms": 0} == other.stats.as_dict() | {"ttft_ms": 0, "tpot_ms": 0}


@pytest.mark.parametrize("name", STACKS)
def test_reading_and_answering_is_generating(llama: PreTrainedModel, name: str) -> None:
    engine = engine_for(llama, STACKS[name])
    one, two = engine.session(), engine.session()
    for prompt in prompts():
        whole = list(engine.generate(one, prompt, SamplingConfig(max_new_tokens=ANSWER), NO_STOP))
        logits = engine.prefill(two, prompt, max_new_tokens=ANSWER)
        assert answer(engine, two, logits, Sampler(SamplingConfig())) == whole
    steps, (first, second) = steps_by_engine(engine).tokens, prompts()
    assert one.tokens == two.tokens == [*first, *steps[:ANSWER], *second, *steps[ANSWER:]]


def test_a_dictated_answer_is_what_later_turns_build_on(llama: PreTrainedModel) -> None:
    """Under dense attention it is as if it had been part of the prompt."""
    engine = engine_for(llama, "dense")
    first, second = prompts()
    said = list(range(5, 5 + ANSWER))
    session, whole = engine.session(), engine.session()
    answer(engine, session, engine.prefill(session, first, max_new_tokens=ANSWER), Dictation(said))
    after = engine.prefill(session, second, max_new_tokens=1)
    torch.testing.assert_close(
        after, engine.prefill(whole, [*first, *said, *second], max_new_tokens=1), atol=1e-5, rtol=1e-5
    )


def test_what_breaks_off_is_taken_back_whole(llama: PreTrainedModel) -> None:
    engine = engine_for(llama, STACKS["evicted"])
    session = engine.session()
    first, second = prompts()
    answer(engine, session, engine.prefill(session, first, max_new_tokens=ANSWER), Dictation(range(5, 5 + ANSWER)))
    tokens, held = list(session.tokens), session.cache.store_bytes
    stream = engine.decode(
        session, engine.prefill(session, second, max_new_tokens=ANSWER), Dictation([7] * ANSWER), NO_STOP, ANSWER
    )
    next(stream)
    stream.close()
    assert (session.tokens, session.cache.store_bytes, len(session.turns)) == (tokens, held, 1)
    broken = engine.prefill(session, second, max_new_tokens=ANSWER).fill_(float("nan"))
    with pytest.raises(ModelError, match="not numbers"):
        answer(engine, session, broken, Sampler(SamplingConfig()))
    assert (session.tokens, len(session.turns)) == (tokens, 1)


def test_an_answer_needs_a_turn_that_waits_for_it(llama: PreTrainedModel) -> None:
    engine = engine_for(llama, "dense")
    session = engine.session()
    logits = engine.prefill(session, prompts()[0], max_new_tokens=ANSWER)
    answer(engine, session, logits, Dictation(range(5, 5 + ANSWER)))
    with pytest.raises(InputError, match="no turn waits for an answer"):
        answer(engine, session, logits, Dictation([5]))
    with pytest.raises(InputError, match="does not fit"):
        engine.prefill(session, prompts()[1], max_new_tokens=5000)


def test_steps_with_another_selection_are_counted(llama: PreTrainedModel) -> None:
    found = {}
    for name in ("dense", "kept", "every step", "loopserve"):
        session = session_after_turns(engine_for(llama, STACKS[name]))
        found[name] = session.stats.reselected_steps
    steps = ANSWER - 1
    assert found == {"dense": 0, "kept": 0, "every step": steps, "loopserve": steps // 3}


def session_after_turns(engine: TokenEngine) -> Session:
    session = engine.session()
    steps_by_engine(engine, session)
    return session
