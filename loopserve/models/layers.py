"""Read the attention layers of a transformers model, and set its attention implementation."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from transformers import PreTrainedModel

from loopserve.core.errors import ModelError
from loopserve.core.policy.interfaces import LayerSpec, LayerType
from loopserve.models.layer_parts import attention_modules, layer_parts


def read_layers(model: PreTrainedModel) -> tuple[LayerSpec, ...]:
    """Return the attention layers of a model, from its configuration. Raises ModelError for layers that loopserve cannot serve."""
    name = type(model).__name__
    config = model.config.get_text_config(decoder=True)
    query_heads = getattr(config, "num_attention_heads", None)
    count = getattr(config, "num_hidden_layers", None)
    if getattr(config, "kv_lora_rank", None):
        raise ModelError(
            f"{name} keeps compressed keys and values (multi-head latent attention), which policies cannot choose among; "
            "it is not supported"
        )
    modules = attention_modules(model)
    if not query_heads or not count or not modules:
        raise ModelError(
            f"{name} has no attention layers that loopserve recognises (modules with layer_idx and q_proj or qkv_proj)"
        )
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{name} is an encoder-decoder model; loopserve serves decoder-only models")
    if getattr(config, "is_causal", True) is False or getattr(config, "use_bidirectional_attention", None) is True:
        raise ModelError(f"{name} attends in both directions; loopserve serves causal attention")
    if getattr(config, "num_kv_shared_layers", 0):
        raise ModelError(
            f"{name}: its last {config.num_kv_shared_layers} layers read the keys and values of other layers; not supported"
        )
    types = getattr(config, "layer_types", None) or [_type_without_list(config)] * count
    window = getattr(config, "sliding_window", None)
    parts = layer_parts(model, list(types[:count]), query_heads)
    layers = []
    for index, kind in enumerate(types[:count]):
        if kind not in (LayerType.FULL, LayerType.SLIDING):
            raise ModelError(
                f"{name}: layer {index} is a {kind!r} layer; only full and sliding-window attention is supported"
            )
        reach = window if kind == LayerType.SLIDING else None
        kv_heads, head_dim = _head_sizes(modules.get(index), config, query_heads)
        layers.append(LayerSpec(index, LayerType(kind), query_heads, kv_heads, head_dim, reach, parts=parts.get(index)))
    return tuple(layers)


def _head_sizes(module: Any, config: Any, query_heads: int) -> tuple[int, int]:
    """Return (KV heads, head size) of a layer. Read them from its module where layers differ (gemma 4)."""
    kv_heads = _common(config, "num_key_value_heads") or query_heads
    head_dim = _common(config, "head_dim") or config.hidden_size // query_heads
    groups, own = getattr(module, "num_key_value_groups", None), getattr(module, "head_dim", None)
    if isinstance(groups, int) and groups > 0:
        kv_heads = query_heads // groups
    return kv_heads, own if isinstance(own, int) else head_dim


def _common(config: Any, name: str) -> int | None:
    """Return a size that all layers share; None if the configuration has one per layer, which transformers refuses to read."""
    try:
        found: int | None = getattr(config, name, None)
    except Exception:  # transformers.integrations.heterogeneity, in versions that have it
        return None
    return found


def _type_without_list(config: Any) -> str:
    """Return the layer type of families without ``layer_types``, whose layers are all alike: sliding if there is a window."""
    sliding = getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True)
    return LayerType.SLIDING if sliding else LayerType.FULL


def set_implementation(model: PreTrainedModel, name: str) -> None:
    """Set the attention implementation of a model's text part. Its other parts (vision, audio) keep theirs.

    Raises ModelError if the family has its own attention code.
    """
    text = model.config.get_text_config(decoder=True)
    path = _path_to(model.config, text)
    wanted: Any = {"": name} if path == () and getattr(model.config, "sub_configs", None) else name
    for part in reversed(path or ()):
        wanted = {part: wanted}
    model.set_attn_implementation(wanted)
    if text._attn_implementation != name:
        raise ModelError(f"{type(model).__name__} does not let its attention be chosen by name; it is not supported")


def _path_to(config: Any, wanted: Any) -> tuple[str, ...] | None:
    """Return the names of the nested configurations that lead to ``wanted``."""
    if config is wanted:
        return ()
    for name in getattr(config, "sub_configs", None) or ():
        inner = getattr(config, name, None)
        found = _path_to(inner, wanted) if inner is not None else None
        if found is not None:
            return (name, *found)
    return None


def unwrapped(model: Any) -> PreTrainedModel:
    """Return the transformers model inside a wrapper (PEFT, ``torch.compile``, data parallel). Raises ModelError if there is none."""
    found, seen = model, 0
    while seen < 8:
        seen += 1
        inner = found.__dict__.get("_orig_mod") or getattr(found, "_modules", {}).get("_orig_mod")
        if inner is None and not isinstance(found, PreTrainedModel):
            inner = found.get_base_model() if hasattr(found, "get_base_model") else getattr(found, "module", None)
        if inner is None:
            break
        found = inner
    if not isinstance(found, PreTrainedModel):
        raise ModelError(
            f"{type(model).__name__} is no transformers model: give a PreTrainedModel, or a wrapper of PEFT or torch.compile"
        )
    return found


def input_device(model: PreTrainedModel) -> torch.device:
    """Return the device for token ids: that of the embedding, or that on which accelerate runs an offloaded one."""
    embedding = model.get_input_embeddings()
    weight = getattr(embedding, "weight", None)
    device: torch.device = weight.device if isinstance(weight, torch.Tensor) else model.device
    if device.type != "meta":
        return device
    for module in (embedding, model):
        place = _execution_device(getattr(module, "_hf_hook", None))
        if place is not None:
            return place
    raise ModelError(
        f"{type(model).__name__} holds no weights (its device is 'meta'): load it with from_pretrained, or give it weights first"
    )


def _execution_device(hook: Any) -> torch.device | None:
    for each in (hook, *getattr(hook, "hooks", ())):
        place = getattr(each, "execution_device", None)
        if place is not None:
            return torch.device(place)
    return None


def cache_keyword(model: PreTrainedModel) -> str:
    """Return the keyword of the model's forward for its cache: ``past_key_values``, in later versions of transformers ``cache``."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def takes_keywords(model: PreTrainedModel) -> bool:
    """Return whether the model's forward passes unknown keywords to its layers."""
    return any(each.kind is each.VAR_KEYWORD for each in inspect.signature(model.forward).parameters.values())


def vocabulary_size(model: PreTrainedModel) -> int:
    size: int = model.config.get_text_config(decoder=True).vocab_size
    return size
