"""Check the masks that a model requests: attention is causal, within a window or chunk in some layers, and no mask is ever built.

Transformers passes every mask that a model needs to a function registered beside its attention implementation. Without such a
function it builds no mask, and a required mask (of image tokens, of a prefix) would be missing without an error.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import causal_mask_function, sdpa_mask

from loopserve.core.errors import ModelError

_CELLS_AT_ONCE = 1 << 24


def no_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    config: Any = None,
    **options: Any,
) -> None:
    """Build no mask. Raises ModelError if the model needs one: other cells than causal, sliding-window or chunked attention has."""
    if attention_mask is not None and not bool(attention_mask.all()):
        raise _needed(config, "a padding mask of its own")
    if mask_function is causal_mask_function:
        return
    windows = [local_size] if local_size else [None, getattr(config, "sliding_window", None)]
    reaches = [(each, None) for each in windows] + [(None, getattr(config, "attention_chunk_size", None))]
    rows = range(q_length)
    if allow_is_causal_skip and q_length > 3:  # no overlay: a few rows show its kind
        ends: list[range] = [range(1), range(q_length - 2, q_length)]
    else:
        step = max(1, _CELLS_AT_ONCE // max(1, kv_length))
        ends = [rows[start : start + step] for start in range(0, q_length, step)]
    device = options.get("device", "cpu")
    for part in ends:
        wanted = sdpa_mask(
            batch_size=batch_size,
            q_length=len(part),
            kv_length=kv_length,
            q_offset=q_offset + part.start,
            kv_offset=kv_offset,
            mask_function=mask_function,
            allow_is_causal_skip=False,
            device=device,
            use_vmap=bool(options.get("use_vmap", False)),
        )
        queries = torch.arange(len(part), device=device)[:, None] + q_offset + part.start
        keys = torch.arange(kv_length, device=device) + kv_offset
        reaches = [each for each in reaches if wanted is not None and _same(wanted, queries, keys, *each)]
        if not reaches:
            raise _needed(config, "cells beside those of causal, sliding-window or chunked attention")


def _same(wanted: Tensor, queries: Tensor, keys: Tensor, window: int | None, chunk: int | None) -> bool:
    served = keys <= queries
    if window is not None:
        served = served & (queries - keys < window)
    if chunk is not None:
        served = served & (queries // chunk == keys // chunk)
    return bool((wanted == served).all())


def _needed(config: Any, what: str) -> ModelError:
    return ModelError(
        f"{getattr(config, 'model_type', 'this model')}: this pass needs an attention mask ({what}: bidirectional or image tokens, "
        "a prefix, packed sequences); loopserve serves causal, sliding-window and chunked attention"
    )
