"""The bridge reads a model's layers, and refuses by name what it cannot serve."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from loopserve.core.errors import ModelError
from loopserve.core.policy.interfaces import LayerType
from loopserve.models.bridge import TransformersModel, attention
from loopserve.models.layers import read_layers
from loopserve.models.tiny import WINDOW, tiny_model
from tests.models.conftest import engine_for


def test_layers_are_read_with_type_window_and_heads() -> None:
    layers = read_layers(tiny_model("gemma2"))
    assert [layer.type for layer in layers] == [LayerType.SLIDING, LayerType.FULL, LayerType.SLIDING]
    assert [layer.window for layer in layers] == [WINDOW, None, WINDOW]
    assert {(layer.query_heads, layer.kv_heads, layer.head_dim, layer.group) for layer in layers} == {(4, 2, 16, 2)}


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("mamba", {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "vocab_size": 64}),
        ("bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 2, "vocab_size": 64}),
    ],
)
def test_a_model_whose_attention_cannot_be_chosen_is_refused(family: str, options: dict[str, int]) -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **options))
    with pytest.raises(ModelError, match=type(model).__name__):
        engine_for(model, "dense")


def test_a_layer_that_is_no_softmax_attention_is_refused_by_name(llama: PreTrainedModel) -> None:
    llama.config.layer_types = ["full_attention", "linear_attention", "full_attention"]
    with pytest.raises(ModelError, match="layer 1 is a 'linear_attention' layer"):
        read_layers(llama)


def test_an_unknown_attention_keyword_is_refused_by_name(llama: PreTrainedModel) -> None:
    engine = engine_for(llama, "dense")
    model = engine.model
    assert isinstance(model, TransformersModel)
    inner = llama.model.layers[1].self_attn
    real = inner.forward
    inner.forward = lambda *args, **kwargs: real(*args, **kwargs, tree_attention=3)
    session = engine.session()
    with pytest.raises(ModelError, match="'tree_attention'"):
        engine.prefill(session, [3, 4, 5])


def test_calling_the_attention_outside_an_engine_is_refused(llama: PreTrainedModel) -> None:
    query = torch.zeros(1, 4, 2, 16)
    with pytest.raises(ModelError, match=r"Engine or inside loopserve\.apply"):
        attention(llama.model.layers[0].self_attn, query, query, query, None)
