"""Decode steps of Llama models by few calls give what transformers gives, bit by bit, and leave models that somebody changed to it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from loopserve.core.engine.engine import TokenEngine
from loopserve.core.engine.turn import Turn
from loopserve.kernels.native import decoder_layer
from loopserve.models.few_rows import FewRowsLinear, serve_few_rows
from loopserve.models.llama_steps import LlamaSteps, llama_steps
from loopserve.models.loading import load
from loopserve.models.tiny import tiny_model
from tests.models.conftest import GreedySteps, engine_for

STACKS: dict[str, Any] = {
    "dense": "dense",
    "loopserve": {
        "prefill": {"policy": "dense"},
        "decode": {"policy": "loopserve", "budget": 48, "dense_below": 1, "page_budget": 16, "key_bits": 2, "page": 16},
    },
    "snapkv": {"prefill": {"policy": "dense"}, "decode": {"policy": "snapkv", "budget": 40}},
}


@pytest.fixture
def model() -> PreTrainedModel:
    loaded = load("demo", dtype="bfloat16", device="cpu")[0]
    if llama_steps(loaded, engine_for(loaded, "dense").model.layers) is None:
        pytest.skip("no compiled kernels, or torch sums otherwise")
    return loaded


def answers(engine: TokenEngine, sessions: int, tokens: int = 8) -> tuple[Tensor, list[dict[str, Any]]]:
    """The logits of every output of some sessions that are decoded together, and the figures of their turns."""
    seen = [GreedySteps() for _ in range(sessions)]
    turns: list[Turn] = []
    for number, steps in enumerate(seen):
        prompt = torch.randint(4, 200, (90 + 7 * number,), generator=torch.Generator().manual_seed(number)).tolist()
        turns.append(engine.begin(engine.session(), prompt, steps, max_new_tokens=tokens))
        while not turns[-1].output:
            engine.run_pass(turns[-1:])
    while not turns[0].finished:
        engine.run_pass(turns)
    assert all(turn.error is None for turn in turns)
    figures = [turn.session.stats.as_dict() for turn in turns]
    kept = [{name: value for name, value in each.items() if not name.endswith("_ms")} for each in figures]
    return torch.stack([torch.stack(each.logits) for each in seen]), kept


def without(engine: TokenEngine) -> TokenEngine:
    engine.model._steps = None  # type: ignore[attr-defined]
    return engine


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of each pass that ran by few calls."""
    passes: list[int] = []
    original = LlamaSteps.forward

    def forward(self: LlamaSteps, batch: Any) -> Tensor:
        passes.append(len(batch.contexts))
        return original(self, batch)

    monkeypatch.setattr(LlamaSteps, "forward", forward)
    return passes


@pytest.mark.parametrize("sessions", [1, 3])
@pytest.mark.parametrize("stack", STACKS)
def test_logits_and_figures_are_those_of_transformers(
    stack: str, sessions: int, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = counted(monkeypatch)
    logits, figures = answers(engine_for(model, STACKS[stack]), sessions)
    assert passes.count(sessions) == 7
    expected, known = answers(without(engine_for(model, STACKS[stack])), sessions)
    assert torch.equal(logits, expected) and figures == known


def test_more_rows_than_the_product_takes_run_through_transformers(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = counted(monkeypatch)
    answers(engine_for(model, "dense"), 9, tokens=3)
    assert 9 not in passes


def add_hook(model: Any) -> Callable[[], None]:
    called: list[int] = []
    handle = model.model.layers[1].register_forward_hook(lambda *_: called.append(1))

    def undo() -> None:
        handle.remove()
        assert called

    return undo


def put_other_weight(model: Any) -> Callable[[], None]:
    layer = model.model.layers[0].mlp.up_proj
    before, layer.weight = layer.weight, torch.nn.Parameter(layer.weight.detach() * 2, requires_grad=False)
    return lambda: setattr(layer, "weight", before)


def put_other_module(model: Any) -> Callable[[], None]:
    layer = model.model.layers[0].self_attn
    before, other = (
        layer.v_proj,
        torch.nn.Linear(*reversed(layer.v_proj.weight.shape), bias=False, dtype=torch.bfloat16),
    )
    layer.v_proj = other
    return lambda: setattr(layer, "v_proj", before)


def put_other_forward(model: Any) -> Callable[[], None]:
    layer = model.model.layers[0].mlp
    layer.forward = lambda hidden: hidden * 0
    return lambda: delattr(layer, "forward")


@pytest.mark.parametrize("change", [add_hook, put_other_weight, put_other_module, put_other_forward])
def test_a_changed_model_runs_through_transformers(
    change: Callable[[Any], Callable[[], None]], model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = engine_for(model, "dense")
    passes = counted(monkeypatch)
    undo = change(model)
    found, _ = answers(served, 1)
    assert not passes
    expected, _ = answers(without(engine_for(model, "dense")), 1)
    assert torch.equal(found, expected)
    undo()
    answers(served, 1)
    assert passes


def test_weights_changed_in_place_count(model: PreTrainedModel) -> None:
    served = engine_for(model, "dense")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(2)
    assert torch.equal(answers(served, 1)[0], answers(without(engine_for(model, "dense")), 1)[0])


def test_other_models_are_left_alone(model: PreTrainedModel) -> None:
    def found(other: PreTrainedModel) -> LlamaSteps | None:
        return llama_steps(other, engine_for(other, "dense").model.layers)

    plain = copy.deepcopy(model)
    for each in plain.modules():
        if isinstance(each, FewRowsLinear):
            each.__class__ = torch.nn.Linear
    qwen = tiny_model("qwen3").to(torch.bfloat16)
    serve_few_rows(qwen)
    hooked = copy.deepcopy(model)
    add_hook(hooked)
    assert [found(each) for each in (plain, qwen, hooked, load("demo", dtype="float32", device="cpu")[0])] == [None] * 4


@pytest.mark.parametrize("size", [48, 576, 2048, 2304])
def test_the_norm_is_transformers(size: int, model: PreTrainedModel) -> None:
    lanes = decoder_layer.lanes_of_sums()
    assert lanes is not None
    source = torch.Generator().manual_seed(size)
    norm = LlamaRMSNorm(size, 1e-5)
    norm.weight = torch.nn.Parameter(torch.rand(size, generator=source).bfloat16(), requires_grad=False)
    rows = (torch.randn(6, size, generator=source) * torch.tensor([1e-4, 1e-2, 0.1, 1, 10, 1e4])[:, None]).bfloat16()
    assert torch.equal(decoder_layer.rms_norm(rows, norm.weight, 1e-5, lanes), norm(rows[:, None])[:, 0])
