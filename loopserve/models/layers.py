"""Read the layers of a transformers model, and set its attention implementation."""

from __future__ import annotations

import inspect
from itertools import chain
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from loopserve.core.errors import ModelError
from loopserve.core.policy.layers import LayerSpec, LayerType
from loopserve.models.layer_parts import attention_modules, layer_parts

_KINDS = {  # transformers' names of layer types; those of layers without attention may hold a state or nothing
    "full_attention": LayerType.FULL,
    "sliding_attention": LayerType.SLIDING,
    "chunked_attention": LayerType.CHUNKED,
    "hybrid": LayerType.FULL,
    "hybrid_sliding": LayerType.SLIDING,
    "conv": LayerType.RECURRENT,
    "linear_attention": LayerType.RECURRENT,
    "moe": LayerType.NONE,
    "mlp": LayerType.NONE,
}


def read_layers(model: PreTrainedModel) -> tuple[LayerSpec, ...]:
    """Return the layers of a model, from its configuration. Raises ModelError for layers that loopserve cannot serve."""
    name = type(model).__name__
    config = model.config.get_text_config(decoder=True)
    query_heads = getattr(config, "num_attention_heads", None)
    count = getattr(config, "num_hidden_layers", None)
    modules = attention_modules(model)
    if not query_heads or not count or not modules:
        raise ModelError(
            f"{name} has no attention layers that loopserve recognises (modules with layer_idx and q_proj, qkv_proj or q_b_proj)"
        )
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{name} is an encoder-decoder model; loopserve serves decoder-only models")
    if getattr(config, "is_causal", True) is False or getattr(config, "use_bidirectional_attention", None) is True:
        raise ModelError(f"{name} attends in both directions; loopserve serves causal attention")
    if crossed := getattr(config, "cross_attention_layers", None):
        raise ModelError(
            f"{name}: layer {crossed[0]} attends to an image instead of the conversation (cross attention), so this model is not "
            "supported"
        )
    types = list((getattr(config, "layer_types", None) or [_type_without_list(config)] * count)[:count])
    for index, kind in enumerate(types):
        if kind not in _KINDS:
            raise ModelError(
                f"{name}: layer {index} is a {kind!r} layer; known are {', '.join(map(repr, _KINDS))}, so this model is not supported"
            )
    states = _recurrent_states(model, types)
    windows = {LayerType.SLIDING: "sliding_window", LayerType.CHUNKED: "attention_chunk_size"}
    parts = layer_parts(model, types, query_heads)
    layers = []
    for index, kind in enumerate(types):
        served = _KINDS[kind]
        if served in (LayerType.RECURRENT, LayerType.NONE):
            recurrent = states[index]
            layers.append(LayerSpec(index, served, 0, 0, 0, recurrent=recurrent, repeatable=not recurrent))
            continue
        module = modules.get(index)
        if module is None:
            raise ModelError(
                f"{name}: the attention of layer {index} has no module of its own, so this model is not supported"
            )
        layers.append(
            LayerSpec(
                index,
                served,
                query_heads,
                *_head_sizes(module, config, query_heads),
                window=getattr(config, windows[served], None) if served in windows else None,
                parts=parts.get(index),
                value_dim=_value_size(module),
                reads=_owner(config, types, index),
                recurrent=states[index],
                repeatable=not states[index] and not _counts_positions(module),
                latent=hasattr(module, "expand_kv"),
            )
        )
    if getattr(config, "kv_lora_rank", None) and not any(_has_latent(each) for each in modules.values()):
        raise ModelError(
            f"{name} keeps compressed keys and values (multi-head latent attention) in a way that policies cannot choose among; it is "
            "not supported"
        )
    if not any(spec.holds_pairs for spec in layers):
        raise ModelError(f"{name} has no attention layer, only recurrent ones; loopserve serves models that have both")
    return tuple(layers)


def _recurrent_states(model: PreTrainedModel, types: list[str]) -> list[int]:
    """Return how many recurrent or convolution states each layer keeps in transformers' cache."""
    if not any(_KINDS[kind] is LayerType.RECURRENT or kind.startswith("hybrid") for kind in types):
        return [0] * len(types)
    found = [getattr(each, "number_of_states", 0) for each in DynamicCache(config=model.config).layers]
    return [
        number if _KINDS[kind] is not LayerType.NONE else 0
        for kind, number in zip(types, found + [0] * len(types), strict=False)
    ]


def _owner(config: Any, types: list[str], index: int) -> int | None:
    """Return the layer whose keys and values a layer reads (gemma 3n, gemma 4): the last of its type that has its own."""
    shared = getattr(config, "num_kv_shared_layers", 0) or 0
    first = len(types) - shared
    if index < first or not shared:
        return None
    owners = [each for each in range(first) if types[each] == types[index]]
    if not owners:
        raise ModelError(f"layer {index} reads the keys and values of another layer, and none of its type has any")
    return owners[-1]


def _has_latent(module: Any) -> bool:
    """Return whether a layer makes its keys and values from a latent (multi-head latent attention).

    Recent versions of transformers cache the latent and call ``expand_kv`` afterwards; earlier ones cache the keys and values.
    """
    return hasattr(module, "kv_b_proj")


def _latent_sizes(module: Any) -> tuple[int, int]:
    """Return (heads, size of a key) of a layer with a latent."""
    if any(hasattr(module, each) for each in ("indexer", "index_topk")):
        raise ModelError(
            f"{type(module).__name__} chooses the pairs it attends to by an indexer of its own, beside which policies cannot choose; "
            "it is not supported"
        )
    heads, key = getattr(module, "num_heads", None), getattr(module, "qk_head_dim", None)
    if not isinstance(heads, int) or not isinstance(key, int):
        raise ModelError(f"{type(module).__name__} does not say the sizes of its heads, so this model is not supported")
    return heads, key


def _counts_positions(module: Any) -> bool:
    """Return whether a layer scales queries by positions that it counts from the cache's length (llama 4)."""
    return bool(getattr(module, "attn_temperature_tuning", False)) and not getattr(module, "use_rope", True)


def _head_sizes(module: Any, config: Any, query_heads: int) -> tuple[int, int]:
    """Return (KV heads, head size) of a layer. Read them from its module where layers differ (gemma 4)."""
    if _has_latent(module):
        return _latent_sizes(module)
    kv_heads = _common(config, "num_key_value_heads") or query_heads
    head_dim = _common(config, "head_dim") or config.hidden_size // query_heads
    groups, own = getattr(module, "num_key_value_groups", None), getattr(module, "head_dim", None)
    if isinstance(groups, int) and groups > 0:
        kv_heads = query_heads // groups
    return kv_heads, own if isinstance(own, int) else head_dim


def _value_size(module: Any) -> int | None:
    """Return the head size of a layer's values where its module names one; None: that of the keys."""
    size = getattr(module, "v_head_dim", None)
    return size if isinstance(size, int) else None


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
    weight = next(chain(embedding.parameters(), embedding.buffers()), None)
    device: torch.device = weight.device if weight is not None else model.device
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
