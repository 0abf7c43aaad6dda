"""Compute decode steps of Llama models by few calls: compiled kernels around the attention, the model's own parts at both ends.

Transformers takes some 300 calls per layer for what is little work for one row. The results are its own, bit by bit. Passes that hold
anything but decode steps, models of another form, and models that somebody has changed (hooks, adapters, other weights) run through
transformers.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.module import _has_any_global_hook
from transformers import LlamaForCausalLM, PreTrainedModel
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaMLP,
    LlamaModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)

from loopserve.core.engine.attention import attend
from loopserve.core.engine.forward import ForwardBatch, ForwardContext, LayerCall
from loopserve.core.policy.interfaces import Phase
from loopserve.core.policy.layers import LayerSpec, LayerType
from loopserve.kernels import backend
from loopserve.kernels.native import decoder_layer
from loopserve.kernels.native.decoder_layer import DecoderLayers, LayerWeights, Sizes
from loopserve.kernels.native.linear import LEAST_OUTPUTS, MOST_ROWS
from loopserve.models.few_rows import FewRowsLinear

_PARTS = {LlamaForCausalLM, LlamaModel, LlamaDecoderLayer, LlamaAttention, LlamaMLP, LlamaRMSNorm, LlamaRotaryEmbedding}
_PARTS |= {FewRowsLinear, torch.nn.Embedding, torch.nn.ModuleList}
_VECTOR = 32  # numbers that torch computes an activation of at once; the rest is computed otherwise


class LlamaSteps:
    """Hold a model's weights as the kernels take them, and what would show that somebody has changed the model."""

    def __init__(self, model: Any, specs: Sequence[LayerSpec], lanes: int) -> None:
        """Take a model that ``llama_steps`` has looked at."""
        self._model, self._lanes = model, lanes
        first, config = specs[0], model.config
        sizes = Sizes(config.hidden_size, first.query_heads, first.kv_heads, first.head_dim, config.intermediate_size)
        activated = model.model.layers[0].mlp.act_fn
        numbers = torch.arange(decoder_layer.NUMBERS, dtype=torch.int32, device="cpu").to(torch.int16)
        with torch.no_grad():
            table = activated(numbers.view(torch.bfloat16))
        self._layers = DecoderLayers([_weights(each) for each in model.model.layers], sizes, table, lanes)
        self._calls = [LayerCall(spec.index, model.model.layers[spec.index].self_attn.scaling) for spec in specs]
        self._modules = list(model.modules())
        self._held = [
            held
            for each in self._modules
            for held in (each._modules, each._parameters, each._forward_hooks, each._forward_pre_hooks)
        ]
        self._attributes = [vars(each) for each in self._modules]
        self._seen = self._state()

    def _state(self) -> tuple[Any, ...]:
        """Return the model's modules, parameters and hooks, the types of its modules, and which have a forward of their own."""
        owned = ["forward" in each for each in self._attributes]
        held = map(id, chain.from_iterable(map(dict.values, self._held)))
        return tuple(held), tuple(map(type, self._modules)), owned, self._model.training

    def serve(self, contexts: Sequence[ForwardContext]) -> bool:
        """Return whether these contexts are decode steps, few enough, of a model as it was, and nothing demands other kernels."""
        if len(contexts) > MOST_ROWS or any(each.phase is not Phase.DECODE or each.hosted for each in contexts):
            return False
        plain = not (torch.is_autocast_enabled("cpu") or _has_any_global_hook() or torch.compiler.is_compiling())
        return plain and backend.chosen() in _COMPILED and self._layers.in_place and self._state() == self._seen

    def forward(self, batch: ForwardBatch) -> Tensor:
        """Run one pass; return the logits of each context ``[contexts, vocabulary]``."""
        contexts, inner = batch.contexts, self._model.model
        with (
            torch.no_grad(),
            backend.use(backend.chosen()),
        ):  # the choice of kernels is read once and not in every layer
            hidden = inner.embed_tokens(batch.token_ids)
            cos, sin = inner.rotary_emb(hidden[None], position_ids=batch.positions[None])
            rows = self._layers.rows(hidden, cos[0], sin[0])
            for call in self._calls:
                queries = rows.before_attention(call.layer)
                for context, keys, values in zip(contexts, rows.keys, rows.values, strict=True):
                    context.store(call.layer, keys, values)
                rows.after_attention(call.layer, attend(contexts, call, queries))
            norm = inner.norm
            normed = decoder_layer.rms_norm(rows.hidden, norm.weight, norm.variance_epsilon, self._lanes)
            logits: Tensor = self._model.lm_head(normed)
            return logits


_COMPILED = ("auto", "cpu")


def llama_steps(model: PreTrainedModel, specs: Sequence[LayerSpec]) -> LlamaSteps | None:
    """Return the decode steps of a model, or None if it is not of this form or no compiled kernel serves it."""
    if type(model) is not LlamaForCausalLM or model.config.hidden_act != "silu" or not _known_parts(model):
        return None
    alike = {(each.type, each.query_heads, each.kv_heads, each.head_dim, each.value_dim) for each in specs}
    if len(alike) != 1 or specs[0].type is not LayerType.FULL or model.config.intermediate_size % _VECTOR:
        return None
    if backend.unavailable("cpu", "cpu") is not None:
        return None
    lanes = decoder_layer.lanes_of_sums()
    return None if lanes is None else LlamaSteps(model, specs, lanes)


def _known_parts(model: PreTrainedModel) -> bool:
    """Return whether a model consists of Llama's own parts, with bfloat16 weights that the kernels read, and no hooks."""
    activations = {id(each.mlp.act_fn) for each in model.model.layers}
    for each in model.modules():
        if id(each) in activations:
            continue
        if type(each) not in _PARTS or each._forward_hooks or each._forward_pre_hooks or "forward" in vars(each):
            return False
        if isinstance(each, FewRowsLinear) and each.out_features < LEAST_OUTPUTS:
            return False
    weights = chain(model.parameters(), (each for each in model.buffers() if each.dim() > 1))
    return all(each.dtype is torch.bfloat16 and each.is_cpu and each.is_contiguous() for each in weights)


def _weights(layer: Any) -> LayerWeights:
    attention, mlp = layer.self_attn, layer.mlp
    before, after = layer.input_layernorm, layer.post_attention_layernorm
    linears = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
    wide = (mlp.gate_proj, mlp.up_proj, mlp.down_proj)
    return LayerWeights._make(
        [
            before.weight,
            *chain.from_iterable((each.weight, each.bias) for each in linears),
            after.weight,
            *chain.from_iterable((each.weight, each.bias) for each in wide),
            before.variance_epsilon,
            after.variance_epsilon,
        ]
    )
