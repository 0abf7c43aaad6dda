"""Run transformers alone, with its own attention and cache, as the baseline of comparisons."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from loopserve.core.kv.buffers import PairBuffer
from loopserve.models.layers import cache_keyword


def converse(model: PreTrainedModel, prompts: Sequence[Sequence[int]], output_tokens: int) -> list[int]:
    """Answer each prompt greedily with exactly ``output_tokens`` tokens. The cache is kept over the turns."""
    cache = DynamicCache(config=model.config)
    ids: list[int] = []
    answers: list[int] = []
    for prompt in prompts:
        ids += prompt
        batch = torch.tensor([ids], dtype=torch.long, device=model.device)
        with torch.no_grad():
            output = cast("Any", model).generate(
                batch,
                attention_mask=torch.ones_like(batch),
                **{cache_keyword(model): cache},
                max_new_tokens=output_tokens,
                min_new_tokens=output_tokens,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
        answers += output[0, len(ids) :].tolist()
        ids = output[0].tolist()
    return answers


class _PreallocatedLayer(DynamicLayer):
    """Write new pairs in place into a buffer with spare capacity, and return a view of its filled part."""

    def __init__(self, pairs: PairBuffer) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.pairs = pairs
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.pairs.append(key_states[0], value_states[0])
        return self.pairs.keys[None], self.pairs.values[None]

    def get_seq_length(self) -> int:
        return self.pairs.length

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        return self.pairs.length + int(query_length), 0


def preallocated_cache(pairs: Sequence[PairBuffer]) -> Cache:
    """Return a cache of one row over buffers with spare capacity. New pairs are written into them, without a copy."""
    return Cache(layers=[_PreallocatedLayer(each) for each in pairs])


def growing_cache(model: PreTrainedModel, pairs: Sequence[PairBuffer]) -> Cache:
    """Return transformers' own ``DynamicCache``, which concatenates at every step, with the pairs of the buffers."""
    cache = DynamicCache(config=model.config)
    for layer, each in zip(cache.layers, pairs, strict=True):
        cast("DynamicLayer", layer).update(each.keys[None], each.values[None])
    return cache


def forward(model: PreTrainedModel, cache: Cache, token_ids: Tensor) -> Tensor:
    """Feed ``[T]`` token ids after the cached ones. Return the logits ``[vocabulary]`` of the last. Uses the model's own attention."""
    seen = cache.get_seq_length()
    positions = torch.arange(seen, seen + len(token_ids), device=token_ids.device)[None]
    with torch.no_grad():
        output = model(
            input_ids=token_ids[None],
            position_ids=positions,
            use_cache=True,
            logits_to_keep=1,
            **{cache_keyword(model): cache},
        )
    logits: Tensor = output.logits[0, -1]
    return logits
