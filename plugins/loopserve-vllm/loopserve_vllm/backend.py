"""Let a stack's policies choose what vLLM's CPU attention computes. vLLM's own kernels compute whatever is dense."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionBackendImpl

from loopserve import ConfigError
from loopserve.core.engine.forward import LayerCall
from loopserve.core.engine.hosted import attend_hosted
from loopserve_vllm.kernels import part_of, write_block
from loopserve_vllm.requests import Requests, follow
from loopserve_vllm.start import settings


class LoopServeBackend(CPUAttentionBackend):
    """vLLM's CPU attention backend; with a stack, its layers ask the stack's policies."""

    @staticmethod
    def get_impl_cls() -> type[CPUAttentionBackendImpl]:
        found = settings(get_current_vllm_config())
        if found is None:
            return CPUAttentionBackendImpl
        follow(found)
        return LoopServeImpl


class LoopServeImpl(CPUAttentionBackendImpl):
    """One attention layer."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        unlike = {
            "a sliding window": self.sliding_window != -1,
            "ALiBi": self.alibi_slopes is not None,
            "attention sinks": self.sinks is not None,
            "the keys of another layer": self.kv_sharing_target_layer_name is not None,
            f"attention of type {self.attn_type}": self.attn_type != AttentionType.DECODER,
        }
        for name in (name for name, applies in unlike.items() if applies):
            raise ConfigError(
                f"loopserve-vllm: a layer has {name}, which policies do not rule: serve it without a stack"
            )

    def do_kv_cache_update(self, layer: Any, key: Tensor, value: Tensor, cache: Tensor, slots: Tensor) -> None:
        super().do_kv_cache_update(layer, key, value, cache, slots)
        if Requests.current is not None:
            Requests.current.layers[extract_layer_index(layer.layer_name)].written(slots)

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cache: Tensor,
        batch: Any,
        output: Tensor,
        **rest: Any,
    ) -> Tensor:
        """batch: the attention metadata. Shapes: ``[tokens, heads, D]``, the cache ``[blocks, Hkv, block_size, 2 * D]``."""
        requests, stock = Requests.current, partial(super().forward, layer)
        if batch is None or requests is None:  # warming up
            return stock(query, key, value, cache, batch, output, **rest)
        index = extract_layer_index(layer.layer_name)
        requests.layers[index].bind(cache, partial(write_block, layer, self))
        rows = requests.rows(batch, cache.shape[2])
        asked = [row for row in rows if row.context is not None]
        for row in asked:
            row.context.append(index, key[row.tokens].transpose(0, 1), value[row.tokens].transpose(0, 1))
        found = attend_hosted(
            [row.context for row in asked],
            LayerCall(index, self.scale, self.logits_soft_cap or None),
            [query[row.tokens].transpose(0, 1).contiguous() for row in asked],
        )
        sparse = {row.number: each for row, each in zip(asked, found, strict=True) if each is not None}
        if not sparse:
            return stock(query, key, value, cache, batch, output, **rest)
        by_head = output.view(-1, self.num_heads, self.head_size)
        dense = [row for row in rows if row.number not in sparse]
        if dense:
            numbers, lengths = [row.number for row in dense], [row.length for row in dense]
            if (part := tuple(numbers)) not in requests.shared:
                requests.shared[part] = part_of(batch, numbers, lengths, layer, self, query.dtype)
            packed = torch.cat([query[row.tokens] for row in dense])
            packed_output = torch.empty_like(packed)
            stock(packed, key, value, cache, requests.shared[part], packed_output, **rest)
            for row, each in zip(dense, packed_output.split(lengths), strict=True):
                by_head[row.tokens] = each
        for row in asked:
            if row.number in sparse:
                by_head[row.tokens] = sparse[row.number].transpose(0, 1)
        return output
