"""Call vLLM's CPU kernels for some requests of a batch, and to see where they put the numbers of a pair."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from vllm import _custom_ops as ops
from vllm import envs
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl, CPUAttentionMetadata

from loopserve.core.engine.paged_requests import Row
from loopserve.core.kv.paged import BlockLayer


def part_of(
    impl: Any, batch: CPUAttentionMetadata, rows: list[Row], layer: Any, dtype: torch.dtype
) -> CPUAttentionMetadata:
    """Return the metadata of some requests of a batch, as vLLM's builder makes that of all."""
    lengths = [row.length for row in rows]
    chosen = torch.tensor([row.number for row in rows], dtype=torch.long, device="cpu")
    starts = torch.tensor([0, *lengths], dtype=torch.int32, device="cpu").cumsum(0, dtype=torch.int32)
    own = {"query_start_loc": starts, "seq_lens": batch.seq_lens[chosen].contiguous()}
    plan = ops.cpu_attn_get_scheduler_metadata(
        **own,
        num_reqs=len(rows),
        num_heads=impl.num_heads,
        num_kv_heads=impl.num_kv_heads,
        head_dim=impl.head_size,
        dtype=dtype,
        causal=True,
        sliding_window_size=-1,
        isa=layer.isa,
        enable_kv_split=envs.VLLM_CPU_ATTN_SPLIT_KV,
        dynamic_causal=None,
        kv_cache_dtype=impl.kv_cache_dtype,
    )
    table = batch.block_table[chosen].contiguous()
    return replace(batch, **own, num_actual_tokens=sum(lengths), block_table=table, scheduler_metadata=plan)


def bind(impl: Any, blocks: BlockLayer, layer: Any, cache: Tensor) -> None:
    """Have ``blocks`` read the layer's cache ``[blocks, Hkv, block_size, 2 * D]``."""
    blocks.bind(cache, partial(_write_block, impl, layer))


def _write_block(impl: Any, layer: Any, keys: Tensor, values: Tensor, cache: Tensor) -> None:
    """Fill a cache of one block with the pairs ``[block_size, 1, D]``, as the layer's own are written."""
    slots = torch.arange(len(keys), dtype=torch.long, device="cpu")
    CPUAttentionBackendImpl.do_kv_cache_update(impl, layer, keys, values, cache, slots)
