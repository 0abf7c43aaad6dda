"""Call vLLM's Triton kernels for some requests of a batch. Its blocks hold a pair in a row, read by loopserve's in place."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from vllm.v1.attention.backends.triton_attn import TritonAttentionMetadata

from loopserve.core.engine.paged_requests import Row
from loopserve.core.kv.paged import BlockLayer


def part_of(
    impl: Any, batch: TritonAttentionMetadata, rows: list[Row], layer: Any, dtype: torch.dtype
) -> TritonAttentionMetadata:
    """Return the metadata of some requests of a batch, as vLLM's builder makes that of all."""
    lengths, device = [row.length for row in rows], batch.seq_lens.device
    chosen = torch.tensor([row.number for row in rows], dtype=torch.long, device=device)
    return replace(
        batch,
        num_actual_tokens=sum(lengths),
        max_query_len=max(lengths),
        query_start_loc=torch.tensor([0, *lengths], dtype=torch.int32, device=device).cumsum(0, dtype=torch.int32),
        seq_lens=batch.seq_lens[chosen],
        block_table=batch.block_table[chosen],
    )


def bind(impl: Any, blocks: BlockLayer, layer: Any, cache: Tensor) -> None:
    """Have ``blocks`` read the layer's cache ``[blocks, Hkv, block_size, 2 * D]``."""
    blocks.bind_rows(cache)
