"""A conversation that began inside ``torch.inference_mode`` goes on outside it, and the other way round."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch

import loopserve
from loopserve.core.engine.engine import TokenEngine
from loopserve.core.engine.session import Session
from tests.faults.models import answer, engine, ids, tiny, tokens

# From transformers 5.24 on the keyword is ``cache``; both are the caller's.
pytestmark = pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated:FutureWarning")

STACKS: list[Any] = [
    "dense",
    {"prefill": {"policy": "dense"}, "decode": {"policy": "snapkv", "budget": 16, "window": 4, "sink_tokens": 1}},
    {"prefill": {"policy": "loopserve"}, "decode": {"policy": "loopserve", "budget": 64, "interval": 2}},
    {"prefill": {"policy": "dense"}, "decode": {"policy": "h2o", "budget": 16}},
]
INSIDE = [(True, False, False), (False, True, False), (True, True, False), (False, False, True)]


def mode(inside: bool) -> AbstractContextManager[Any]:
    return torch.inference_mode() if inside else nullcontext()


def turns(served: TokenEngine, inside: tuple[bool, ...]) -> list[list[int]]:
    """Turns of one conversation, with an undo, a fork and an observation between them."""
    found, session = [], served.session()
    for number, each in enumerate(inside):
        with mode(each):
            found.append(answer(served, session, tokens(40, number), 5))
            answer(served, session, tokens(3, 9), 2)
            session.undo()
            session = Session.fork(session)
    return found


@pytest.mark.parametrize("stack", STACKS, ids=["dense", "snapkv", "loopserve", "h2o"])
@pytest.mark.parametrize("inside", INSIDE)
def test_turns_of_an_engine(stack: Any, inside: tuple[bool, ...]) -> None:
    served = engine(tiny(), stack)
    assert turns(served, inside) == turns(served, (False, False, False))


@pytest.mark.parametrize("stack", STACKS, ids=["dense", "snapkv", "loopserve", "h2o"])
def test_an_answer_begun_inside_is_finished_outside(stack: Any) -> None:
    served = engine(tiny(), stack)
    wanted = answer(served, served.session(), tokens(40), 8)
    with torch.inference_mode():
        stream = served.generate(served.session(), tokens(40), lambda logits: int(logits.argmax()), max_new_tokens=8)
        found = [next(stream) for _ in range(3)]
    assert found + list(stream) == wanted


@pytest.mark.parametrize("stack", STACKS, ids=["dense", "snapkv", "loopserve", "h2o"])
def test_turns_under_apply(stack: Any) -> None:
    model = tiny()

    def two(first: bool, second: bool) -> list[int]:
        with mode(first):
            one = model.generate(ids(40), max_new_tokens=5, do_sample=False, return_dict_in_generate=True)
        longer = torch.cat([one.sequences, ids(4, 3)], 1)
        with mode(second):
            two = model.generate(longer, past_key_values=one.past_key_values, max_new_tokens=5, do_sample=False)
        found: list[int] = two[0].tolist()
        return found

    with loopserve.apply(model, stack):
        wanted = two(False, False)
        assert two(True, False) == two(False, True) == two(True, True) == wanted
