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

CONTEXT, TOLD = 2400, 48
# Largest mean KL(dense || stack) in nats and smallest share of equal likeliest tokens: about 1.5 times what was measured.
BOUNDS: dict[str, tuple[float, float]] = {}


def test_loopserve_answers_what_dense_answers() -> None:
    result = run_book_demo(stacks=["dense", "loopserve"], progress=lambda *step: None, model="smollm2")
    dense, own = (result["stacks"][name] for name in ("dense", "loopserve"))
    assert dense["right"] == dense["asked"] == 6
    assert own["same"] == own["asked"], [turn["answer"] for turn in own["turns"]]
    assert own["attended_fraction"] < 0.06


class _Watch:
    """Dictates tokens and keeps the logits that stood at each."""

    def __init__(self, tokens: list[int]) -> None:
        self.choose, self.seen = Dictation(tokens), []

    def __call__(self, logits: torch.Tensor) -> int:
        self.seen.append(logits.float().clone())
        return self.choose(logits)


def predictions(served: Any, stack: Any, ids: list[int]) -> list[torch.Tensor]:
    engine = Engine(*served, stack).token_engine
    told = ids[CONTEXT : CONTEXT + TOLD]
    watch = _Watch(told)
    with closing(engine.session()) as session:
        logits = engine.prefill(session, ids[:CONTEXT], max_new_tokens=len(told))
        for _ in engine.decode(session, logits, watch, frozenset(), len(told)):
            pass
    return watch.seen


@pytest.fixture(scope="module")
def ids(plain: Any, prose: str) -> list[int]:
    return plain[1](prose)["input_ids"]


@pytest.fixture(scope="module")
def dense(served: Any, ids: list[int]) -> list[torch.Tensor]:
    return predictions(served, "dense", ids)


@pytest.mark.parametrize("name", ["loopserve", "loopserve-paper", "snapkv", "quest", "tova", "h2o"])
def test_agreement_with_dense(served: Any, ids: list[int], dense: list[torch.Tensor], name: str) -> None:
    stack = load_stack(name)
    budget = budget_for(0.05, CONTEXT + TOLD / 2, uncounted_outputs_of(stack, TOLD / 2))
    own = predictions(served, with_budget(stack, budget), ids)
    kl = sum(Distributions.of(dense).divergences(own)) / TOLD
    same = sum(int(one.argmax() == other.argmax()) for one, other in zip(dense, own, strict=True)) / TOLD
    print(f"{name}: KL {kl:.4f}, top-1 {same:.3f}, budget {budget}")
    most, least = BOUNDS[name]
    assert kl <= most and same >= least, f"{name}: KL {kl:.4f} (at most {most}), top-1 {same:.3f} (at least {least})"
