"""What stacks that compress cost a pretrained model: answers to needles, and agreement with dense at 5 % of the pairs."""

from __future__ import annotations

from contextlib import closing
from typing import Any

import pytest
import torch

from loopserve.api import Engine, load_stack
from loopserve.bench.book_demo import run_book_demo
from loopserve.bench.budget import budget_for, uncounted_outputs_of, with_budget
from loopserve.bench.quality.conversation import Distributions
from loopserve.core.engine.sampling import Dictation

CONTEXT, GIVEN = 2400, 48
# Largest mean KL(dense || stack) in nats and smallest share of equal likeliest tokens, with a margin of a few of 48 tokens.
# Measured: .0357 / .896, .0914 / .812, .1217 / .833, .4665 / .583, .0821 / .812, .1130 / .812.
BOUNDS = {
    "loopserve": (0.055, 0.83),
    "loopserve-paper": (0.14, 0.72),
    "snapkv": (0.19, 0.74),
    "quest": (0.7, 0.48),
    "tova": (0.13, 0.72),
    "h2o": (0.17, 0.72),
}


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    return run_book_demo(stacks=["dense", "loopserve"], progress=lambda *step: None, model="smollm2", dtype="float32")


def test_dense_answers_every_question_of_the_demonstration(result: dict[str, Any]) -> None:
    dense = result["stacks"]["dense"]
    assert dense["right"] == dense["asked"] == 6


def test_loopserve_answers_what_dense_answers(result: dict[str, Any]) -> None:
    own = result["stacks"]["loopserve"]
    assert own["same"] == own["asked"], [turn["answer"] for turn in own["turns"]]


def test_loopserve_reads_the_pairs_that_it_was_given(result: dict[str, Any]) -> None:
    assert result["stacks"]["loopserve"]["attended_fraction"] < 0.06


class _Watch:
    """Dictates tokens and keeps the logits that stood at each."""

    def __init__(self, tokens: list[int]) -> None:
        self.choose, self.seen = Dictation(tokens), []

    def __call__(self, logits: torch.Tensor) -> int:
        self.seen.append(logits.float().clone())
        return self.choose(logits)


def predictions(served: Any, stack: Any, ids: list[int]) -> list[torch.Tensor]:
    engine = Engine(*served, stack).token_engine
    given = ids[CONTEXT : CONTEXT + GIVEN]
    watch = _Watch(given)
    with closing(engine.session()) as session:
        logits = engine.prefill(session, ids[:CONTEXT], max_new_tokens=len(given))
        for _ in engine.decode(session, logits, watch, frozenset(), len(given)):
            pass
    return watch.seen


@pytest.fixture(scope="module")
def ids(plain: Any, prose: str) -> list[int]:
    return plain[1](prose)["input_ids"]


@pytest.fixture(scope="module")
def dense(served: Any, ids: list[int]) -> list[torch.Tensor]:
    return predictions(served, "dense", ids)


@pytest.mark.parametrize("name", BOUNDS)
def test_agreement_with_dense(served: Any, ids: list[int], dense: list[torch.Tensor], name: str) -> None:
    stack = load_stack(name)
    budget = budget_for(0.05, CONTEXT + GIVEN / 2, uncounted_outputs_of(stack, GIVEN / 2))
    own = predictions(served, with_budget(stack, budget), ids)
    kl = sum(Distributions.of(dense).divergences(own)) / GIVEN
    same = sum(int(one.argmax() == other.argmax()) for one, other in zip(dense, own, strict=True)) / GIVEN
    most, least = BOUNDS[name]
    assert kl <= most and same >= least, f"{name}: KL {kl:.4f} (at most {most}), top-1 {same:.3f} (at least {least})"
