"""Where observation of the past suffices and where only the current query helps (docs/LOG.md), on two trained models.

One was trained to look ahead: a question's rows already look at the facts the answer will need, as in large models. The other
looks a fact up only when the answer reaches it; no row before has looked there.
"""

from __future__ import annotations

from typing import Any

import pytest

from loopserve.api import Engine
from loopserve.bench.recall import HELD_OUT_SEED, RecallTask, make_dialogues

OBSERVE = {
    "policy": "loopserve", "budget": 60, "interval": 2, "window": 16, "second_hop": "kept", "memory": 0.9, "share": "all",
    "recent_window": 8,
}  # fmt: skip
QUERY = {**OBSERVE, "interval": 16, "page_budget": 32, "page": 32, "key_bits": 2}


def answered(model: str, decode: dict[str, Any]) -> float:
    """Share of two-key answers right over 600 tokens and two turns, at a tenth of the pairs."""
    engine = Engine.from_pretrained(model, stack={"prefill": {"policy": "dense"}, "decode": decode})
    right = asked = 0
    for position in ("begin", "middle", "end"):
        task = RecallTask(tokens=600, turns=2, keys=2, position=position)
        for dialogue in make_dialogues(task, 2, HELD_OUT_SEED + 77):
            with engine.session() as chat:
                for turn in dialogue.turns:
                    right += chat.send(turn.text, max_new_tokens=40).text == turn.answer
                    asked += 1
    return right / asked


@pytest.mark.parametrize("model", ["demo", "demo-no-lookahead"])
def test_the_current_query_brings_dense_level_answers_on_either_model(model: str) -> None:
    assert answered(model, {"policy": "full"}) >= 0.9
    assert answered(model, QUERY) >= 0.9


def test_observation_of_the_past_needs_a_model_that_looks_ahead() -> None:
    assert answered("demo-no-lookahead", OBSERVE) <= 0.1
    assert answered("demo", OBSERVE) >= 0.25
