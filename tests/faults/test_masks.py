"""A mask that matters is refused by name; parts of a model beside its text keep their own attention."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    chunked_causal_mask_function,
    packed_sequence_mask_function,
    sliding_window_causal_mask_function,
)

import loopserve
from loopserve.core.errors import ModelError
from loopserve.core.policy.interfaces import DecodeCompressor, Observation, Phase, Step
from loopserve.core.stack.stack import PolicyStack
from loopserve.models.layers import set_implementation
from loopserve.models.masks import no_mask
from loopserve.policies.prefill.dense import DensePrefill
from tests.faults.models import VOCABULARY, answer, engine, generated, ids, sharpened, tiny, tokens

WINDOW = 5


def asked(function: Any, queries: int = 9, keys: int = 12, **options: Any) -> None:
    """Ask for the mask of the last ``queries`` of ``keys`` tokens."""
    no_mask(1, queries, keys, keys - queries, 0, mask_function=function, device="cpu", **options)


def prefix(_: Any, __: Any, query: Any, key: Any) -> Any:
    return (key <= query) | (key < 6)


@pytest.mark.parametrize("queries", [1, 2, 9, 12])
def test_causal_and_sliding_masks_are_not_made(queries: int) -> None:
    asked(causal_mask_function, queries)
    asked(sliding_window_causal_mask_function(WINDOW), queries, local_size=WINDOW)
    asked(lambda b, h, q, k: k <= q, queries, allow_is_causal_skip=False)


@pytest.mark.parametrize(
    ("function", "options"),
    [
        (bidirectional_mask_function, {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": True}),
        (chunked_causal_mask_function(WINDOW, torch.zeros(1, dtype=torch.long)), {"local_size": WINDOW}),
        (sliding_window_causal_mask_function(4), {"local_size": WINDOW}),
        (prefix, {"allow_is_causal_skip": False}),
        (prefix, {"allow_is_causal_skip": False, "use_vmap": True}),
        (packed_sequence_mask_function(torch.tensor([[0] * 4 + [1] * 8])), {"allow_is_causal_skip": False}),
        (causal_mask_function, {"attention_mask": torch.tensor([[0, 1, 1]])}),
    ],
)
def test_a_mask_that_matters_is_refused(function: Any, options: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match="needs an attention mask"):
        asked(function, 12, 12, **options)


def test_a_chunk_that_is_not_full_needs_no_mask() -> None:
    asked(chunked_causal_mask_function(20, torch.zeros(1, dtype=torch.long)), local_size=20)


def test_a_model_that_attends_in_both_directions_is_refused() -> None:
    for change in ({"is_causal": False}, {"use_bidirectional_attention": True}):
        model = tiny("gemma3_text", sliding_window=8)
        for name, value in change.items():
            setattr(model.config, name, value)
        with pytest.raises(ModelError, match="attends in both directions"), loopserve.apply(model, "dense"):
            pass


def test_a_layer_that_says_it_is_not_causal_is_refused() -> None:
    model = tiny()
    served = engine(model)
    model.model.layers[1].self_attn.is_causal = False
    with pytest.raises(ModelError, match=r"LlamaAttention attends in both directions \(is_causal=False\)"):
        answer(served, served.session(), tokens(9), 2)


def test_a_bidirectional_flag_set_after_load_is_seen_in_the_pass() -> None:
    model = tiny()
    served = engine(model)
    model.config.is_causal = False
    with pytest.raises(ModelError, match="llama: this pass needs an attention mask"):
        answer(served, served.session(), tokens(9), 2)


@pytest.mark.parametrize(
    "options",
    [
        {"attention_chunk_size": 8, "floor_scale": 16},
        {"attention_chunk_size": 8, "attn_temperature_tuning": False},
        {"attention_chunk_size": 5, "layer_types": ["chunked_attention"] * 3},
    ],
)
def test_chunks_are_served_as_transformers_does(options: dict[str, Any]) -> None:
    experts = {"num_local_experts": 2, "num_experts_per_tok": 1, "intermediate_size_mlp": 64}
    kinds = ["chunked_attention", "full_attention", "chunked_attention"]
    model = tiny(
        "llama4_text",
        **{"num_hidden_layers": 3, "layer_types": kinds, "no_rope_layers": [1, 0, 1], **experts, **options},
    )
    plain = generated(model, ids(30), 6)
    with loopserve.apply(model, "dense"):
        assert generated(model, ids(30), 6) == plain
    served = engine(model)
    assert answer(served, served.session(), tokens(30), 6) == plain


def test_gemma_4_with_its_head_sizes_per_layer() -> None:
    options = {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "sliding_window": 8,
        "global_head_dim": 32,
        "num_global_key_value_heads": 1,
        "hidden_size_per_layer_input": 0,
        "num_kv_shared_layers": 0,
        "vocab_size_per_layer_input": VOCABULARY,
    }
    model = tiny("gemma4_text", **options)
    plain = generated(model, ids(30), 6)
    served = engine(model)
    assert {layer.head_dim for layer in served.model.layers} == {16, 32}
    assert answer(served, served.session(), tokens(30), 6) == plain


PER_LAYER = {"vocab_size_per_layer_input": VOCABULARY, "global_head_dim": 32}


def test_gemma_4_with_layers_that_share_keys_is_served() -> None:
    options = {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "hidden_size_per_layer_input": 8, "sliding_window": 8}
    model = tiny("gemma4_text", **options, layer_types=["sliding_attention", "full_attention"] * 2, **PER_LAYER)
    plain = generated(model, ids(30), 6)
    with loopserve.apply(model, "dense"):
        assert generated(model, ids(30), 6) == plain
    served = engine(model)
    assert answer(served, served.session(), tokens(30), 6) == plain


def test_a_layer_that_reads_other_pairs_than_it_says_is_refused() -> None:
    options = {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "hidden_size_per_layer_input": 8, "sliding_window": 8}
    model = tiny("gemma4_text", **options, layer_types=["sliding_attention", "full_attention"] * 2, **PER_LAYER)
    served = engine(model)
    attention = model.model.layers[2].self_attn
    inner = attention.forward

    def changed(*args: Any, shared_kv_states: Any, **kwargs: Any) -> Any:
        other = {kind: (keys * 2, values) for kind, (keys, values) in shared_kv_states.items()}
        return inner(*args, shared_kv_states=other, **kwargs)

    attention.forward = changed
    with pytest.raises(ModelError, match="changes its keys after they were put into the cache"):
        answer(served, served.session(), tokens(9), 2)


TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "pad_token_id": 0,
}
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
IMAGE_TOKEN = VOCABULARY - 1


def with_vision(kind: str = "llava") -> PreTrainedModel:
    """A text model with a vision tower beside it."""
    torch.manual_seed(0)
    if kind == "llava":
        config = AutoConfig.for_model(
            "llava",
            text_config={"model_type": "llama", **TEXT},
            vision_config={"model_type": "clip_vision_model", **VISION, "projection_dim": 32},
            image_token_index=IMAGE_TOKEN,
        )
    else:
        config = AutoConfig.for_model(
            "gemma3",
            text_config={"model_type": "gemma3_text", **TEXT, "sliding_window": 64, "query_pre_attn_scalar": 16},
            vision_config={"model_type": "siglip_vision_model", **VISION},
            image_token_index=IMAGE_TOKEN,
            mm_tokens_per_image=4,
        )
    model: PreTrainedModel = sharpened(AutoModelForImageTextToText.from_config(config, dtype=torch.float32))
    return model


def with_image() -> dict[str, torch.Tensor]:
    """A prompt with one image of four tokens."""
    words = [min(token, IMAGE_TOKEN - 1) for token in tokens(18)]
    prompt = torch.tensor([[*words[:6], *[IMAGE_TOKEN] * 4, *words[6:]]])
    pixels = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(2), dtype=torch.float32)
    return {"input_ids": prompt, "pixel_values": pixels, "attention_mask": torch.ones_like(prompt)}


SNAPKV = {"prefill": {"policy": "dense"}, "decode": {"policy": "snapkv", "budget": 16, "window": 4, "sink_tokens": 1}}


@pytest.mark.parametrize("kind", ["llava", "gemma3"])
def test_text_is_served_by_a_model_with_a_vision_tower(kind: str) -> None:
    model = with_vision(kind)
    plain = generated(model, ids(30), 5)
    with loopserve.apply(model, "dense"):
        assert generated(model, ids(30), 5) == plain
        vision = model.config.vision_config
        assert vision._attn_implementation != "loopserve"
    set_implementation(model, "loopserve")
    served = engine(model)
    assert answer(served, served.session(), tokens(30), 5) == plain


def test_an_image_is_served_where_only_the_text_part_is_ours() -> None:
    model = with_vision()

    def said() -> list[int]:
        found = model.generate(**with_image(), max_new_tokens=5, do_sample=False)
        answer: list[int] = found[0, 22:].tolist()
        return answer

    plain = said()
    with loopserve.apply(model, "dense"):
        assert said() == plain
    with loopserve.apply(model, SNAPKV):
        assert len(said()) == 5


class Asking(DecodeCompressor[dict[str, Any]]):
    """Asks for the first row of each turn once more."""

    name: ClassVar[str] = "asking"
    paper: ClassVar[str] = ""

    def init_state(self) -> dict[str, Any]:
        return {}

    def after_forward(self, step: Step, state: dict[str, Any]) -> Observation | None:
        return Observation(torch.tensor([step.turn_start])) if step.phase is Phase.PREFILL else None


def test_a_policy_that_would_run_image_tokens_again_is_refused() -> None:
    model = with_vision()
    stack = PolicyStack("asking", DensePrefill(), Asking())
    with loopserve.apply(model, stack):
        with pytest.raises(ModelError, match="holds images or sound"):
            model.generate(**with_image(), max_new_tokens=3, do_sample=False)
        assert len(generated(model, ids(20).clamp(max=IMAGE_TOKEN - 1), 3)) == 3


def test_image_tokens_that_see_each_other_are_refused() -> None:
    model = with_vision("gemma3")
    batch = with_image()
    kinds = (batch["input_ids"] == IMAGE_TOKEN).long()
    with loopserve.apply(model, "dense"):
        with pytest.raises(ModelError, match="needs an attention mask"):
            model.generate(**batch, token_type_ids=kinds, max_new_tokens=2, do_sample=False)
        text = ids(20)
        found = model.generate(text, token_type_ids=torch.zeros_like(text), max_new_tokens=2, do_sample=False)
    assert torch.equal(found, model.generate(text, max_new_tokens=2, do_sample=False))
