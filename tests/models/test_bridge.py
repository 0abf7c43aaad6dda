"""The bridge reads a model's layers, and refuses by name what it cannot serve."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from loopserve.core.errors import ConfigError, ModelError
from loopserve.core.policy.layers import LayerType
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
        ("gptj", {"n_embd": 32, "n_layer": 2, "n_head": 2, "rotary_dim": 8, "vocab_size": 64}),
    ],
)
def test_a_model_whose_attention_cannot_be_chosen_is_refused(family: str, options: dict[str, int]) -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **options))
    with pytest.raises(ModelError, match=type(model).__name__):
        engine_for(model, "dense")


def test_layers_that_attend_to_images_are_refused_by_name() -> None:
    text = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "num_hidden_layers": 2,
        "cross_attention_layers": [1],
        "vocab_size": 64,
        "pad_token_id": 0,
    }
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("mllama", text_config=text))
    with pytest.raises(ModelError, match=r"MllamaForCausalLM: layer 1 attends to an image .*\(cross attention\)"):
        TransformersModel(model)


def test_a_layer_that_is_no_softmax_attention_is_refused_by_name(llama: PreTrainedModel) -> None:
    llama.config.layer_types = ["full_attention", "compressed_sparse_attention", "full_attention"]
    with pytest.raises(ModelError, match="layer 1 is a 'compressed_sparse_attention' layer"):
        read_layers(llama)


def test_a_recurrent_layer_that_is_not_recognised_is_refused_by_name(llama: PreTrainedModel) -> None:
    llama.config.layer_types = ["full_attention", "linear_attention", "full_attention"]
    with pytest.raises(ModelError, match=r"layer 1 \(LlamaAttention\) cannot be tried by itself"):
        engine_for(llama, "dense")


def test_layers_of_other_kinds_are_read_with_what_they_keep() -> None:
    hybrid = TransformersModel(tiny_model("falcon_h1")).layers
    assert {(each.type, each.recurrent, each.repeatable) for each in hybrid} == {(LayerType.FULL, 1, False)}
    mixed = TransformersModel(tiny_model("nemotron_h")).layers
    kinds = [LayerType.RECURRENT, LayerType.NONE, LayerType.FULL, LayerType.NONE, LayerType.RECURRENT]
    assert [each.type for each in mixed] == kinds
    assert [each.holds_pairs for each in mixed] == [False, False, True, False, False]
    assert [each.reads for each in read_layers(tiny_model("gemma4_text"))] == [None, None, None, None, 2, 3]
    chunked = read_layers(tiny_model("llama4_text"))
    assert [(each.type, each.window, each.repeatable) for each in chunked] == [
        *[(LayerType.CHUNKED, WINDOW, True)] * 3,
        (LayerType.FULL, None, False),
    ]
    latent = read_layers(tiny_model("deepseek_v3"))[0]
    assert (latent.latent, latent.kv_heads, latent.head_dim, latent.value_dim) == (True, 4, 24, 12)


def test_pairs_that_layers_share_are_not_evicted() -> None:
    with pytest.raises(ConfigError, match="evicts pairs, which layers 3, 5 of this model share"):
        engine_for(tiny_model("gemma3n_text"), "snapkv-evict")


def test_layers_of_shared_pairs_use_the_memory_of_one() -> None:
    engine = engine_for(tiny_model("gemma3n_text"), "dense")
    session = engine.session()
    engine.prefill(session, list(range(3, 40)))
    own, layers = session.cache.own_layers, session.cache.layers
    assert len(own) == 4
    assert layers[5].store is layers[3].store
    assert session.cache.store_bytes == sum(each.store.nbytes for each in own if each.store is not None)
    other = session.fork()
    assert other.cache.layers[5].store is other.cache.layers[3].store is not layers[3].store


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
