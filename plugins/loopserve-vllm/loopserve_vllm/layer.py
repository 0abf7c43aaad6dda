"""Let a stack's policies choose what an attention layer of vLLM computes. vLLM's own kernels compute whatever is dense."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import AttentionType

from loopserve import ConfigError
from loopserve.core.engine.forward import LayerCall
from loopserve.core.engine.paged_requests import PagedRequests, Row


class PolicyLayer:
    """An attention layer, mixed in before a backend's own. It has ``bind`` and ``part_of`` of the backend's kernels."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        unlike = {
            "a sliding window": self.sliding_window not in (-1, (-1, -1)),
            "ALiBi": self.alibi_slopes is not None,
            "attention sinks": self.sinks is not None,
            "the keys of another layer": self.kv_sharing_target_layer_name is not None,
            f"attention of type {self.attn_type}": self.attn_type != AttentionType.DECODER,
        }
        for name in (name for name, applies in unlike.items() if applies):
            raise ConfigError(f"loopserve-vllm: policies do not rule a layer with {name}: serve it without a stack")

    def do_kv_cache_update(self, layer: Any, key: Tensor, value: Tensor, cache: Tensor, slots: Tensor) -> None:
        super().do_kv_cache_update(layer, key, value, cache, slots)
        if (requests := PagedRequests.current) is not None:
            requests.layers[extract_layer_index(layer.layer_name)].written(slots)

    def forward(
        self, layer: Any, query: Tensor, key: Tensor, value: Tensor, kv: Tensor, batch: Any, output: Tensor, **own: Any
    ) -> Tensor:
        """batch: the attention metadata. Shapes: ``[tokens, heads, D]``, its cache kv ``[blocks, Hkv, block_size, 2 * D]``."""
        requests, stock, sparse = PagedRequests.current, partial(super().forward, layer), {}
        if batch is not None and requests is not None:  # not warming up
            call = LayerCall(extract_layer_index(layer.layer_name), self.scale, self.logits_soft_cap or None)
            self.bind(requests.layers[call.layer], layer, kv)
            requests.take(batch, kv.shape[2])
            sparse = requests.attend(call, query, key, value)
        if not sparse:
            return stock(query, key, value, kv, batch, output, **own)

        def dense(rows: list[Row], queries: Tensor, found: Tensor) -> None:
            if (part := tuple(row.number for row in rows)) not in requests.shared:
                requests.shared[part] = self.part_of(batch, rows, layer, query.dtype)
            stock(queries, key, value, kv, requests.shared[part], found, **own)

        requests.fill(output.view(-1, self.num_heads, self.head_size), query, sparse, dense)
        return output
