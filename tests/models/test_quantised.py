"""Quantised linear layers multiply as their expanded weights do, and a model with them is served like any other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from loopserve import Engine
from loopserve.core.errors import ConfigError
from loopserve.models import quantised
from loopserve.models.digest import model_digest
from loopserve.models.layers import input_device
from loopserve.models.loading import load
from loopserve.models.quantised import GROUP, PACKED_ROWS, Int4Linear, Int8Linear, QuantisedEmbedding, quantise

KINDS = [Int8Linear, Int4Linear]


def linear(outputs: int, inputs: int, bias: bool, dtype: torch.dtype, seed: int = 0) -> torch.nn.Linear:
    generator = torch.Generator().manual_seed(seed)
    made = torch.nn.Linear(inputs, outputs, bias=bias, dtype=dtype)
    with torch.no_grad():
        made.weight.copy_(torch.randn(outputs, inputs, generator=generator, dtype=torch.float32) * 0.05)
        if bias:
            made.bias.copy_(torch.randn(outputs, generator=generator, dtype=torch.float32))
    return made


def tiny(**options: Any) -> PreTrainedModel:
    sizes = {
        "vocab_size": 160,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "eos_token_id": None,
    }
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", **(sizes | options))
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    return model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("outputs", [16, 48, 320])
def test_products_are_those_of_the_expanded_weights(kind: Any, dtype: torch.dtype, bias: bool, outputs: int) -> None:
    layer = linear(outputs, 96, bias, dtype)
    held = kind(layer)
    for rows in (1, 2, 3, 7, PACKED_ROWS, PACKED_ROWS + 1, 40):
        inputs = torch.randn(1, rows, 96, generator=torch.Generator().manual_seed(rows), dtype=torch.float32).to(dtype)
        found = held(inputs)
        wanted = inputs.double() @ held.weight.double().T + (layer.bias.double() if bias else 0)
        assert found.shape == (1, rows, outputs) and found.dtype is dtype
        assert torch.allclose(found.double(), wanted, atol=0.02, rtol=0.02)


def test_int8_weights_are_off_by_half_a_step_at_most() -> None:
    layer = linear(64, 96, False, torch.float32)
    held = Int8Linear(layer)
    step = held.scale.float()[:, None]
    assert bool(((held.weight - layer.weight).abs() <= 0.51 * step + 1e-9).all())


def test_weights_of_four_bits_are_kept_as_they_are() -> None:
    """As those of a file whose blocks of 32 hold 4 bits, a scale and an offset."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (32, 4, GROUP), generator=generator, dtype=torch.int64)
    codes[..., 0], codes[..., 1] = 0, 15
    scale = torch.rand(32, 4, 1, generator=generator, dtype=torch.float32) + 0.5
    offset = -8 * scale
    layer = linear(32, 4 * GROUP, False, torch.float32)
    with torch.no_grad():
        layer.weight.copy_((codes * scale + offset).flatten(1))
    assert torch.allclose(Int4Linear(layer).weight, layer.weight, rtol=0.02, atol=0.05)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_of_zeros_stays_zero(kind: Any) -> None:
    layer = linear(16, 64, False, torch.float32)
    with torch.no_grad():
        layer.weight[3] = 0
    held = kind(layer)
    assert bool((held(torch.ones(1, 64, dtype=torch.float32))[:, 3].abs() < 1e-6).all())


@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_quantised_model_is_served_as_transformers_computes_it(weights: str, tied: bool) -> None:
    model = tiny(tie_word_embeddings=tied)
    found = quantise(model, weights)
    assert (found.layers, found.left) == (15, ()) and found.bytes_after < found.bytes_before / 2
    assert isinstance(model.get_input_embeddings(), QuantisedEmbedding) is tied
    assert input_device(model) == torch.device("cpu")
    prompt = torch.randint(3, 150, (1, 50), generator=torch.Generator().manual_seed(1))
    plain = model.generate(prompt, max_new_tokens=12, do_sample=False)[0, 50:].tolist()
    import loopserve

    with loopserve.apply(model, "dense"):
        assert model.generate(prompt, max_new_tokens=12, do_sample=False)[0, 50:].tolist() == plain
    with loopserve.apply(model, "loopserve"):
        assert len(model.generate(prompt, max_new_tokens=12, do_sample=False)[0, 50:]) == 12


def test_an_embedding_that_shares_the_output_weights_reads_the_same_rows() -> None:
    model = tiny(tie_word_embeddings=True)
    quantise(model, "int8")
    ids = torch.tensor([[3, 5, 3]])
    rows = model.get_input_embeddings()(ids)
    assert torch.equal(rows[0], model.get_output_embeddings().weight[ids[0]])


def test_the_head_of_a_model_with_int4_weights_has_int8() -> None:
    model = tiny()
    quantise(model, "int4")
    assert isinstance(model.get_output_embeddings(), Int8Linear)
    assert isinstance(model.model.layers[0].mlp.down_proj, Int4Linear)


def test_layers_of_other_shapes_are_left_and_named() -> None:
    model = tiny(intermediate_size=72)
    found = quantise(model, "int4")
    assert found.left[0] == "model.layers.0.mlp.gate_proj" and len(found.left) == 6 and found.layers == 9
    assert "left as they are, for their shapes: model.layers.0.mlp.gate_proj and 5 more" in found.said


def test_the_digest_says_what_the_weights_are() -> None:
    class Tokenizer:
        chat_template = None

        @staticmethod
        def get_vocab() -> dict[str, int]:
            return {}

    digests = set()
    for weights in (None, "int8", "int4"):
        model = tiny()
        if weights is not None:
            quantise(model, weights)
        digests.add(model_digest(model, Tokenizer()))
    model = tiny(initializer_range=0.03)
    quantise(model, "int8")
    digests.add(model_digest(model, Tokenizer()))
    assert len(digests) == 4


def test_a_kernel_that_multiplies_wrongly_is_found_at_load(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Int8Linear.packed
    monkeypatch.setattr(quantised.Int8Linear, "packed", lambda self, rows: right(self, rows) + 1)
    with pytest.raises(ConfigError, match=r"multiplies packed weights wrongly here \(lm_head: off by 1"):
        quantise(tiny(), "int8")


def test_what_cannot_be_quantised_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"unknown format 'int3' \(known: auto, int8, int4\)"):
        load("demo", weights="int3")
    with pytest.raises(ConfigError, match="are for models on a CPU, not on 'meta'"):
        quantise(tiny().to("meta"), "int8")


def test_a_loaded_model_says_what_was_quantised(capsys: pytest.CaptureFixture[str]) -> None:
    engine = Engine.from_pretrained("demo", "dense", weights="int8")
    (line,) = [each for each in capsys.readouterr().err.splitlines() if "int8 weights" in each]
    assert line.startswith("demo: int8 weights in ") and "MiB instead of" in line
    with engine.session() as session:
        session.send("the code of lisbon is amber falcon river .")
        assert session.send("what is the code of lisbon ?").text == "lisbon is amber falcon river ."
