"""What a process has made torch's default dtype, or its default device, changes no figure of an answer and no last bit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch

from loopserve.api import load_stack
from loopserve.bench.budget import with_budget
from loopserve.core.engine.engine import TokenEngine
from loopserve.core.stack.stack import PolicyStack, preset_names
from loopserve.kernels import backend
from loopserve.models.bridge import TransformersModel
from loopserve.models.loading import load
from tests.kernels.cases import IMPLEMENTATIONS
from tests.policies.conversations import answers, model

OTHERS = (torch.bfloat16, torch.float16, torch.float64)
TURNS, ANSWER, BUDGET, CHUNK = (120, 70), 9, 48, 64
TIMES = ("seconds", "_ms", "tokens_per_second")


@contextmanager
def default(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@cache
def stack(preset: str) -> PolicyStack:
    return with_budget(load_stack(preset), BUDGET)


def held(family: str, preset: str) -> tuple[torch.Tensor, list[dict[str, Any]]]:
    """Logits and figures of a conversation."""
    served = TokenEngine(
        TransformersModel(model(family)),
        stack(preset),
        chunk_tokens=CHUNK,
        measure_coverage=True,
        policy_checks="strict",
    )
    session = served.session()
    logits = torch.cat(list(answers(served, session, 0, TURNS, ANSWER)))
    figures = [
        {name: value for name, value in turn.as_dict().items() if not name.endswith(TIMES)} for turn in session.turns
    ]
    return logits, figures


CASES = [("llama", kernels, preset) for kernels in IMPLEMENTATIONS for preset in preset_names()]
SOFTCAPPED = [("gemma2", "auto", preset) for preset in ("loopserve", "minference", "xattention", "snapkv")]


@pytest.mark.parametrize(("family", "kernels", "preset"), CASES + SOFTCAPPED)
def test_a_preset_answers_the_same_under_any_default(family: str, kernels: str, preset: str) -> None:
    with backend.use(kernels):
        wanted, figures = held(family, preset)
        assert torch.isfinite(wanted).all()
        for dtype in OTHERS:
            with default(dtype):
                logits, found = held(family, preset)
            assert torch.equal(logits, wanted), dtype
            assert found == figures, dtype


@pytest.mark.parametrize("preset", preset_names())
def test_a_preset_answers_the_same_under_another_default_device(preset: str) -> None:
    wanted, figures = held("llama", preset)
    torch.set_default_device("meta")  # nothing can be read from it
    try:
        logits, found = held("llama", preset)
    finally:
        torch.set_default_device(None)
    assert torch.equal(logits, wanted) and found == figures


@pytest.mark.parametrize("dtype", OTHERS)
def test_a_model_loaded_under_another_default_is_the_same(dtype: torch.dtype) -> None:
    wanted = load("demo", dtype="float32", device="cpu")[0]
    with default(dtype):
        found = load("demo", dtype="float32", device="cpu")[0]
    for one, other in zip(found.parameters(), wanted.parameters(), strict=True):
        assert torch.equal(one, other)
