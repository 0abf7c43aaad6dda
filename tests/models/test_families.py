"""Every family gets from our engine what transformers gives, and a stack that leaves nothing out changes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from loopserve.models.bridge import TransformersModel
from loopserve.models.tiny import FAMILIES, RECURRENT, tiny_model
from tests.models.conftest import engine_for, steps_by_engine, steps_by_one_pass, steps_by_transformers

# Linear attention is computed in blocks from the first token of a pass on, so its floats depend on where a pass begins.
TOLERANCE = 1e-4
EVERYTHING: dict[str, dict[str, Any]] = {
    "prefill": {"policy": "loopserve", "alpha": 1.0},
    "decode": {"policy": "loopserve", "budget": 4096, "interval": 2},
}


# Transformers drops the recurrent state of these before a pass of several tokens, so its second turn is wrong.
DROPPED = ("jamba",)


def test_the_readme_names_the_families_tested_here() -> None:
    text = " ".join((Path(__file__).parents[2] / "README.md").read_text("utf-8").split())
    named = text.partition("Tested: ")[2].partition(". With the stack")[0].split(", ")
    assert sorted(named) == sorted({"mistral" if family == "mistral_window" else family for family in FAMILIES})


@pytest.mark.parametrize("family", FAMILIES)
def test_dense_engine_equals_one_pass_without_a_cache(family: str) -> None:
    ours = steps_by_engine(engine_for(tiny_model(family), "dense", chunk_tokens=17))
    whole = steps_by_one_pass(tiny_model(family), ours.tokens)
    assert ours.tokens == whole.tokens
    assert ours.difference(whole) < TOLERANCE


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in DROPPED])
def test_dense_engine_equals_transformers(family: str) -> None:
    model = tiny_model(family)
    plain = steps_by_transformers(model)
    ours = steps_by_engine(engine_for(model, "dense"))
    assert ours.tokens == plain.tokens
    assert ours.difference(plain) < (1e-4 if family in RECURRENT else 1e-5)


@pytest.mark.parametrize(
    "family", [family for family in FAMILIES if family != "mistral_window"]
)  # all its layers slide
def test_a_stack_that_leaves_nothing_out_is_bit_equal_to_dense(family: str) -> None:
    model = tiny_model(family)
    dense = steps_by_engine(engine_for(model, "dense"))
    repeatable = all(spec.repeatable for spec in TransformersModel(model).layers)
    stack = (
        EVERYTHING if repeatable else {**EVERYTHING, "decode": {**EVERYTHING["decode"], "first_block": "last_window"}}
    )
    ours = steps_by_engine(engine_for(model, stack))
    assert ours.tokens == dense.tokens
    assert ours.difference(dense) == 0.0


@pytest.mark.parametrize("family", FAMILIES)
def test_chunked_prefill_equals_one_shot(family: str) -> None:
    model = tiny_model(family)
    whole = steps_by_engine(engine_for(model, "dense"))
    chunked = steps_by_engine(engine_for(model, "dense", chunk_tokens=17))
    assert chunked.tokens == whole.tokens
    assert chunked.difference(whole) < (TOLERANCE if family in RECURRENT else 1e-5)


@pytest.mark.parametrize(("family", "field", "value"), [
    ("gemma2", "attn_logit_softcapping", None),
    ("gpt_oss", "sinks", None),
    ("gemma2", "sliding_window", None),
    ("mistral_window", "sliding_window", None),
])  # fmt: skip
def test_the_tiny_models_would_expose_an_ignored_keyword(family: str, field: str, value: object) -> None:
    steps = steps_by_transformers(tiny_model(family))
    changed = tiny_model(family)
    if field == "sinks":
        for layer in changed.model.layers:
            torch.nn.init.constant_(layer.self_attn.sinks, -1e4)
    elif field == "sliding_window":
        changed.config.sliding_window = 10_000
        for layer in changed.model.layers:
            if getattr(layer.self_attn, "sliding_window", None) is not None:
                layer.self_attn.sliding_window = 10_000
    else:
        for layer in changed.model.layers:
            layer.self_attn.attn_logit_softcapping = value
    assert steps_by_transformers(changed).difference(steps) > 1e-3
