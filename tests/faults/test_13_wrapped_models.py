"""Wrappers around a model, families that hand no keywords to their layers, and models whose weights lie elsewhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import loopserve
from loopserve.core.errors import ConfigError, ModelError
from loopserve.core.policy.layers import Need
from loopserve.models.bridge import IMPLEMENTATION, TransformersModel
from tests.faults.models import answer, engine, generated, ids, tiny, tokens

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # of peft's


def compiled(model: Any) -> Any:
    return torch.compile(model, backend="eager")


def adapted(model: Any) -> Any:
    peft = pytest.importorskip("peft")
    options = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    torch.manual_seed(1)
    return peft.get_peft_model(model, options).eval()


def parallel(model: Any) -> Any:
    return torch.nn.DataParallel(model)


@pytest.mark.parametrize("wrap", [compiled, adapted])
def test_generate_of_a_wrapper(wrap: Any) -> None:
    model = wrap(tiny())
    plain = generated(model, ids(20), 5)
    with loopserve.apply(model, "dense"):
        assert generated(model, ids(20), 5) == plain
    assert generated(model, ids(20), 5) == plain


@pytest.mark.parametrize("wrap", [adapted, parallel])
def test_a_pass_of_a_wrapper(wrap: Any) -> None:
    model = wrap(tiny())
    with torch.no_grad():
        plain = model(input_ids=ids(20)).logits
        with loopserve.apply(model, "dense") as state:
            assert torch.allclose(model(input_ids=ids(20)).logits, plain, atol=1e-4)
            assert len(state.stats[0]) == 1


def test_two_wrappers_of_one_model_are_one_model() -> None:
    model = tiny()
    with (
        loopserve.apply(compiled(model), "dense"),
        pytest.raises(ModelError, match="is served by loopserve already"),
        loopserve.apply(model, "dense"),
    ):
        pass


@pytest.mark.parametrize("family", ["stablelm", "nemotron", "phi", "persimmon", "gpt_neox_japanese", "olmo", "cohere"])
def test_families_that_hand_no_keywords_down(family: str) -> None:
    more = {"gpt_neox_japanese": {"intermediate_multiple_size": 2}}.get(family, {})
    model = tiny(family, hidden_size=64, num_key_value_heads=4 if family in ("phi", "persimmon") else 2, **more)
    plain = generated(model, ids(30), 6)
    with torch.no_grad():
        logits = model(ids(30)).logits
    try:
        with loopserve.apply(model, "dense"), torch.no_grad():
            assert generated(model, ids(30), 6) == plain
            assert torch.allclose(model(ids(30)).logits, logits, atol=1e-4)
    except ModelError as error:
        assert family in ("gpt_neox_japanese", "persimmon")
        assert any(reason in str(error) for reason in ("has no attention layers", "be chosen by name"))  # noqa: PT017
        return
    served = engine(model)
    assert answer(served, served.session(), tokens(30), 6) == plain


def test_18_an_offloaded_model() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = tiny()
    plain = generated(model, ids(20), 5)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert model.device.type == "meta"
    with loopserve.apply(model, "dense"):
        assert generated(model, ids(20), 5) == plain
    with pytest.raises(ConfigError, match="are offloaded"), loopserve.apply(model, "expected_attention"):
        pass
    served = engine(model)
    assert answer(served, served.session(), tokens(20), 5) == plain


class Hook:
    """What accelerate leaves on a module whose weights it brings to a device for each call."""

    def __init__(self, device: Any, hooks: tuple[Any, ...] = ()) -> None:
        self.execution_device, self.hooks = device, hooks


@pytest.mark.parametrize("hook", [Hook("cpu"), Hook(None, (Hook(None), Hook("cpu")))])
def test_18_tokens_go_where_an_offloaded_model_is_run(hook: Hook) -> None:
    model = tiny().to("meta")
    assert TransformersModel(model).layers[0].lacks(Need.ROTARY) is None  # a shape only: nothing is known against it
    model.get_input_embeddings()._hf_hook = hook
    model.model.layers[0].self_attn.q_proj._hf_hook = hook
    assert TransformersModel(model).device == torch.device("cpu")
    assert "are offloaded" in str(TransformersModel(model).layers[0].lacks(Need.ROTARY))


def test_18_a_model_without_weights_is_refused() -> None:
    with pytest.raises(ModelError, match="holds no weights"):
        _ = TransformersModel(tiny().to("meta")).device


def test_a_quantised_module_without_a_plain_weight_is_refused_only_where_it_is_needed() -> None:
    class Packed(torch.nn.Module):
        """A linear layer whose weight is not a plain tensor."""

        def __init__(self, inner: torch.nn.Linear) -> None:
            super().__init__()
            self.inner = [inner]
            self.weight = None

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return self.inner[0](hidden)

    model = tiny()
    plain = generated(model, ids(20), 5)
    for layer in model.model.layers:
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(layer.self_attn, name, Packed(getattr(layer.self_attn, name)))
    assert "has no plain linear o_proj" in str(TransformersModel(model).layers[0].lacks(Need.OUTPUT_WEIGHT))
    assert TransformersModel(model).layers[0].lacks(Need.ROTARY) is None
    for stack in ("dense", "loopserve"):
        with loopserve.apply(model, stack):
            assert generated(model, ids(20), 5) == plain


@pytest.mark.parametrize("way", ["direct", "generate", "config"])
def test_19_hidden_states_are_given(way: str) -> None:
    model = tiny()

    def states() -> Any:
        if way == "generate":
            found = model.generate(
                ids(12), max_new_tokens=3, do_sample=False, return_dict_in_generate=True, output_hidden_states=True
            )
            return [each for step in found.hidden_states for each in step]
        model.config.output_hidden_states = way == "config"
        with torch.no_grad():
            return model(ids(12), **({"output_hidden_states": True} if way == "direct" else {})).hidden_states

    plain = states()
    with loopserve.apply(model, "dense"):
        found = states()
    assert len(found) == len(plain) > 0
    assert all(torch.allclose(one, other, atol=1e-4) for one, other in zip(found, plain, strict=True))
    model.config.output_hidden_states = False


def test_19_attention_weights_are_refused_with_the_reason() -> None:
    model = tiny()
    with loopserve.apply(model, "dense"), torch.no_grad(), pytest.raises(ModelError, match="no full weight matrix"):
        model(ids(12), output_attentions=True)


def test_the_implementation_is_restored_in_every_part() -> None:
    model = tiny()
    before = model.config._attn_implementation
    with loopserve.apply(model, "dense"):
        assert model.config._attn_implementation == IMPLEMENTATION
    assert model.config._attn_implementation == before
