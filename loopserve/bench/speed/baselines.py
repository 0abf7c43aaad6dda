"""Time torch's dense attention on a CPU, as the baseline of our operations.

``scaled_dot_product_attention`` runs in float32 and bfloat16. New tokens after a history are split into past (no mask)
and own block (causal), joined by their log-sum-exps, which is faster than a mask. For GPUs see ``speed.gpu``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from loopserve.bench.heads import Heads
from loopserve.bench.speed.paired import Clock, Runner
from loopserve.kernels.fused import fused, merge

_CPU_DTYPES = (torch.float32, torch.bfloat16)


def sdpa(heads: Heads, dtypes: tuple[torch.dtype, ...] = _CPU_DTYPES) -> dict[str, Callable[[], object]]:
    """Return by name every way to compute the causal block of ``heads`` densely with torch's SDPA on a CPU."""
    found: dict[str, Callable[[], object]] = {}
    rows, total = heads.queries.shape[1], heads.keys.shape[1]
    for dtype in dtypes:
        cast = heads.to(dtype)
        queries, keys, values = (each[None] for each in cast.tensors)
        name = str(dtype).removeprefix("torch.")
        grouped = queries.shape[1] != keys.shape[1]
        if rows == 1:
            one = queries.reshape(1, keys.shape[1], -1, queries.shape[3])  # a group's heads as rows
            found[f"sdpa {name}"] = partial(scaled_dot_product_attention, one, keys, values)
        elif rows == total:
            found[f"sdpa {name} causal"] = partial(
                scaled_dot_product_attention, queries, keys, values, is_causal=True, enable_gqa=grouped
            )
        else:
            found[f"sdpa {name} past + causal"] = partial(_split, queries, keys, values, cast.scaling)
    return found


def _split(queries: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Tensor:
    old, new = slice(None, keys.shape[2] - queries.shape[2]), slice(keys.shape[2] - queries.shape[2], None)
    past = fused(queries, keys[:, :, old], values[:, :, old], scaling=scaling)
    own = fused(queries, keys[:, :, new], values[:, :, new], scaling=scaling, causal=True)
    return merge(past, own)[0].to(queries.dtype)


def eager_step(heads: Heads, dtype: torch.dtype) -> Callable[[], object]:
    """Run one decode step by two matrix products and a softmax, which is faster than bfloat16 SDPA on some CPUs."""
    cast = heads.to(dtype)
    rows = cast.queries.reshape(cast.keys.shape[0], -1, cast.queries.shape[2])
    return lambda: torch.softmax(rows @ cast.keys.transpose(1, 2) * cast.scaling, -1) @ cast.values


def fastest(
    candidates: dict[str, Callable[[], object]], scale: float, clock: Clock
) -> tuple[str, Runner, dict[str, float]]:
    """Return the name of the fastest, its runner, and scaled milliseconds of each. Every candidate is tried once, warm."""
    tried = {}
    for name, run in candidates.items():
        seconds = clock(run)
        # Short runs are tried a second time; long ones are warm after their first tile.
        tried[name] = (min(seconds, clock(run)) if seconds < 1.0 else seconds) * scale * 1e3
    best = min(tried, key=tried.__getitem__)
    return best, Runner(candidates[best], scale), tried
