"""The bridge to transformers: registers one attention function, reads a model's layers, runs its forward pass.

A model is not patched: its attention implementation is set by name, and the pass under way travels as a keyword argument down
to the attention function. Knows no policy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_utils import AttentionInterface

from loopserve.core.attention import Call, attend
from loopserve.core.errors import ModelError
from loopserve.core.interfaces import LayerSpec, LayerType, Phase
from loopserve.models.cache_view import CacheView, split_rows
from loopserve.models.layer_parts import layer_parts

IMPLEMENTATION = "loopserve"
# Keywords that change nothing here: positions are the session's own, and the others choose outputs or caching.
_WITHOUT_EFFECT = frozenset(
    {"position_ids", "cache_position", "use_cache", "is_causal", "output_router_logits", "logits_to_keep"}
)
_MUST_BE_OFF = frozenset({"output_attentions", "output_hidden_states", "head_mask"})


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    loopserve_view: CacheView | None = None,
    **unknown: Any,
) -> tuple[Tensor, None]:
    """The attention function of every layer: queries ``[B, Hq, T, D]`` in, ``[B, T, Hq, D]`` out.

    Each keyword a family passes is supported or refused by name; ignoring one would give wrong logits without a word.
    """
    layer: int = module.layer_idx  # type: ignore[assignment]
    if loopserve_view is None:
        raise ModelError(
            "this model is set to loopserve attention: run it through Engine or inside loopserve.apply(model, stack)"
        )
    _refuse(module, unknown, attention_mask, dropout)
    spec = loopserve_view.sessions[0].policies[layer].spec
    window = sliding_window if sliding_window is not None else spec.window

    def one_row(call: Call, queries: Tensor) -> Tensor:
        cache = call.session.cache.layers[layer]
        if call.phase is not Phase.OBSERVE and cache.seen != call.seen_after:
            raise ModelError(
                f"layer {layer} ({type(module).__name__}) did not put its keys and values into the cache; "
                "layers that share another layer's cache are not supported"
            )
        scale = scaling if scaling is not None else queries.shape[-1] ** -0.5
        return attend(call, layer, queries, scaling=scale, softcap=softcap, window=window, sinks=s_aux)

    return split_rows(loopserve_view, one_row, query).contiguous(), None


def _refuse(module: torch.nn.Module, unknown: dict[str, Any], mask: Tensor | None, dropout: float) -> None:
    name = type(module).__name__
    if dropout:
        raise ModelError(f"{name}: attention dropout is for training; call model.eval() first")
    if mask is not None:
        raise ModelError(
            f"{name}: a custom attention mask ({list(mask.shape)}) is not supported; pass a 2-D padding mask"
        )
    for keyword, value in unknown.items():
        if keyword in _WITHOUT_EFFECT or value is None:
            continue
        if keyword in _MUST_BE_OFF:
            if value is not False:
                raise ModelError(
                    f"{name}: {keyword}={value!r} is not supported, sparse attention has no full weight matrix"
                )
            continue
        raise ModelError(
            f"{name} passes the attention keyword {keyword!r}, which loopserve does not know; "
            "ignoring it would give wrong answers, so this model is not supported"
        )


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


class HuggingFaceModel:
    """A causal language model of transformers as the loop sees it (``core.engine.Model``)."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self._layers = read_layers(model)

    @property
    def layers(self) -> Sequence[LayerSpec]:
        return self._layers

    @property
    def max_positions(self) -> int | None:
        return getattr(self.model.config.get_text_config(decoder=True), "max_position_embeddings", None)

    @property
    def device(self) -> torch.device:
        device: torch.device = self.model.device
        return device

    def forward(self, call: Call, token_ids: Tensor) -> Tensor:
        """Run ``[T]`` token ids of one session; logits ``[vocabulary]`` of the last."""
        view = CacheView([call.session], len(self._layers))
        view.padded_length = call.session.cache.seen
        view.bind([call])
        with torch.no_grad():
            output = self.model(
                input_ids=token_ids[None],
                position_ids=call.positions[None],
                past_key_values=view,
                use_cache=True,
                logits_to_keep=1,
                loopserve_view=view,
            )
        logits: Tensor = output.logits[0, -1]
        return logits


AttentionInterface.register(IMPLEMENTATION, attention)
