"""PyTorch's fused CPU attention, called so that it also gives the log-sum-exp, and the merging of parts by it."""

from __future__ import annotations

import torch
from torch import Tensor

# A float stand-in for -inf in additive masks: a row that is masked throughout gets a log-sum-exp near it, which
# vanishes in a merge, where -inf would make the kernel answer 0 with a log-sum-exp of 0.
MASKED = -1e30
_EMPTY = -1e29
_FUSED = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


def fused(
    queries: Tensor, keys: Tensor, values: Tensor, *, scaling: float, causal: bool = False, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(output ``[N, Hq, Tq, D]``, log-sum-exp float32 ``[N, Hq, Tq]``) of ``[N, Hq, Tq, D]`` over ``[N, Hkv, Tk, D]``.

    causal: the diagonal starts at the upper left. mask: additive float32, broadcastable to ``[N, Hq, Tq, Tk]``. Serves
    float32, bfloat16 and float16 with one head size for keys and values.
    """
    if queries.stride(-1) != 1 or keys.stride(-1) != 1 or values.stride(-1) != 1:  # it would read them wrongly
        queries, keys, values = queries.contiguous(), keys.contiguous(), values.contiguous()
    output, lse = _FUSED(queries, keys, values, 0.0, causal, attn_mask=mask, scale=scaling)
    return output, lse


def serves(values: Tensor, head_dim: int, softcap: float | None) -> bool:
    """Whether the fused kernel can do it at all."""
    return not softcap and values.shape[-1] == head_dim


def merge(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Join attention over two disjoint sets of keys: outputs ``[..., Tq, D]`` weigh by their log-sum-exps ``[...,
    Tq]``.
    """
    lse = torch.logaddexp(first[1], second[1])
    weights = [(part[1] - lse).exp_()[..., None] for part in (first, second)]
    return first[0] * weights[0] + second[0] * weights[1], lse


def settle(output: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Rows that saw nothing but masked cells become 0 with -inf."""
    empty = lse < _EMPTY
    if bool(empty.any()):
        return output.masked_fill(empty[..., None], 0.0), lse.masked_fill(empty, float("-inf"))
    return output, lse
