"""Read the attention layers of a transformers model, and set its attention implementation."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from loopserve.core.errors import ModelError
from loopserve.core.policy.interfaces import LayerSpec, LayerType
from loopserve.models.layer_parts import layer_parts


def read_layers(model: PreTrainedModel) -> tuple[LayerSpec, ...]:
    """The attention layers of a model, from its configuration. Raises ModelError for layers loopserve cannot serve."""
    name = type(model).__name__
    config = model.config.get_text_config(decoder=True)
    query_heads = getattr(config, "num_attention_heads", None)
    count = getattr(config, "num_hidden_layers", None)
    attends = any(hasattr(m, "layer_idx") and (hasattr(m, "q_proj") or hasattr(m, "qkv_proj")) for m in model.modules())
    if not query_heads or not count or not attends:
        raise ModelError(
            f"{name} has no attention layers that loopserve recognises (modules with layer_idx and q_proj or qkv_proj)"
        )
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{name} is an encoder-decoder model; loopserve serves decoder-only models")
    kv_heads = getattr(config, "num_key_value_heads", None) or query_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // query_heads
    types = getattr(config, "layer_types", None) or [_type_without_list(config)] * count
    window = getattr(config, "sliding_window", None)
    parts = layer_parts(model, list(types[:count]), query_heads)
    layers = []
    for index, kind in enumerate(types[:count]):
        if kind not in (LayerType.FULL, LayerType.SLIDING):
            raise ModelError(
                f"{name}: layer {index} is a {kind!r} layer; only full and sliding-window attention is supported"
            )
        sliding = kind == LayerType.SLIDING
        reach = window if sliding else None
        layers.append(LayerSpec(index, LayerType(kind), query_heads, kv_heads, head_dim, reach, parts=parts.get(index)))
    return tuple(layers)


def _type_without_list(config: Any) -> str:
    """Families without ``layer_types`` have one kind of layer; a window makes it a sliding one."""
    sliding = getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True)
    return LayerType.SLIDING if sliding else LayerType.FULL


def set_implementation(model: PreTrainedModel, name: str | dict[str, str]) -> None:
    """Set a model's attention implementation; ModelError if the family has its own attention code."""
    model.set_attn_implementation(name)
    if isinstance(name, str) and model.config.get_text_config(decoder=True)._attn_implementation != name:
        raise ModelError(f"{type(model).__name__} does not let its attention be chosen by name; it is not supported")


def vocabulary_size(model: PreTrainedModel) -> int:
    size: int = model.config.get_text_config(decoder=True).vocab_size
    return size
