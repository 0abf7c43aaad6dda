"""Let a stack's policies choose what vLLM's CPU attention computes. vLLM's own kernels compute whatever is dense."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from vllm import _custom_ops as ops
from vllm import envs
from vllm.config import get_current_vllm_config
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
)

from loopserve import ConfigError
from loopserve.core.engine.hosted import LayerCall, attend_hosted
from loopserve_vllm.requests import Requests, Row, follow
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

    def do_kv_cache_update(self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slots: Tensor) -> None:
        super().do_kv_cache_update(layer, key, value, kv_cache, slots)
        if Requests.current is not None:
            Requests.current.layers[extract_layer_index(layer.layer_name)].written(slots)

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: CPUAttentionMetadata | None,
        output: Tensor,
        **options: Any,
    ) -> Tensor:
        requests = Requests.current
        if attn_metadata is None or requests is None:  # warming up
            return super().forward(layer, query, key, value, kv_cache, attn_metadata, output, **options)
        index = extract_layer_index(layer.layer_name)
        requests.layers[index].bind(kv_cache, lambda *pairs: self._write(layer, *pairs))
        rows = requests.rows(attn_metadata, kv_cache.shape[2])
        served = {row.number: row.context for row in rows if row.context is not None}
        queries = {row.number: query[row.tokens].transpose(0, 1).contiguous() for row in rows if row.number in served}
        for row in rows:
            if row.number in served:
                served[row.number].append(index, key[row.tokens].transpose(0, 1), value[row.tokens].transpose(0, 1))
        call = LayerCall(index, self.scale, self.logits_soft_cap or None)
        sparse = dict(zip(served, attend_hosted([*served.values()], call, [*queries.values()]), strict=True))
        dense = [row for row in rows if sparse.get(row.number) is None]
        if len(dense) == len(rows):
            return super().forward(layer, query, key, value, kv_cache, attn_metadata, output, **options)
        by_head = output.view(-1, self.num_heads, self.head_size)
        for row in rows:
            if (found := sparse.get(row.number)) is not None:
                by_head[row.tokens] = found.transpose(0, 1)
        if dense:
            part = tuple(row.number for row in dense)
            if part not in requests.shared:
                requests.shared[part] = self._part(layer, attn_metadata, dense, query.dtype)
            packed = torch.cat([query[row.tokens] for row in dense])
            packed_output = torch.empty_like(packed)
            super().forward(layer, packed, key, value, kv_cache, requests.shared[part], packed_output, **options)
            parts = packed_output.split([row.tokens.stop - row.tokens.start for row in dense])
            for row, found in zip(dense, parts, strict=True):
                by_head[row.tokens] = found
        return output

    def _part(self, layer: Any, metadata: CPUAttentionMetadata, rows: list[Row], dtype: torch.dtype) -> Any:
        """Return the metadata of some requests of the batch, as vLLM's builder makes that of all."""
        numbers = torch.tensor([row.number for row in rows], dtype=torch.long, device="cpu")
        lengths = [0, *(row.tokens.stop - row.tokens.start for row in rows)]
        starts = torch.tensor(lengths, dtype=torch.int32, device="cpu").cumsum(0, dtype=torch.int32)
        own = {"query_start_loc": starts, "seq_lens": metadata.seq_lens[numbers].contiguous()}
        plan = ops.cpu_attn_get_scheduler_metadata(
            **own,
            num_reqs=len(rows),
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_size,
            dtype=dtype,
            causal=True,
            sliding_window_size=-1,
            isa=layer.isa,
            enable_kv_split=envs.VLLM_CPU_ATTN_SPLIT_KV,
            dynamic_causal=None,
            kv_cache_dtype=self.kv_cache_dtype,
        )
        table = metadata.block_table[numbers].contiguous()
        return replace(metadata, **own, num_actual_tokens=int(starts[-1]), block_table=table, scheduler_metadata=plan)

    def _write(self, layer: Any, keys: Tensor, values: Tensor, cache: Tensor) -> None:
        slots = torch.arange(len(keys), dtype=torch.long, device="cpu")
        CPUAttentionBackendImpl.do_kv_cache_update(self, layer, keys, values, cache, slots)
