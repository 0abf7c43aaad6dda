"""Call PyTorch's fused CPU attention with its log-sum-exp, and merge partial results."""

from __future__ import annotations

import torch
from torch import Tensor

# A finite value in place of -inf in additive masks. A fully masked row then has a log-sum-exp near it, which has no
# weight in a merge. With -inf the kernel returns output 0 and log-sum-exp 0.
MASKED = -1e30
_EMPTY = -1e29
_FUSED = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


def fused(
    queries: Tensor, keys: Tensor, values: Tensor, *, scaling: float, causal: bool = False, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return output ``[N, Hq, Tq, D]`` and log-sum-exp float32 ``[N, Hq, Tq]`` of queries ``[N, Hq, Tq, D]`` over keys
    ``[N, Hkv, Tk, D]``.

    causal: the diagonal starts at the upper left cell. mask: additive float32, broadcastable to ``[N, Hq, Tq, Tk]``.
    Serves float32, bfloat16 and float16; keys and values need one head size.
    """
    if (
        queries.stride(-1) != 1 or keys.stride(-1) != 1 or values.stride(-1) != 1
    ):  # the kernel assumes a dense last dimension
        queries, keys, values = queries.contiguous(), keys.contiguous(), values.contiguous()
    output, lse = _FUSED(queries, keys, values, 0.0, causal, attn_mask=mask, scale=scaling)
    return output, lse


def serves(values: Tensor, head_dim: int, softcap: float | None) -> bool:
    """Return whether the fused kernel supports this head size and softcap."""
    return not softcap and values.shape[-1] == head_dim


def merge(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Merge attention over two disjoint sets of keys.

    Each part is (output ``[..., Tq, D]``, log-sum-exp ``[..., Tq]``). Outputs are weighted by their log-sum-exps.
    """
    lse = torch.logaddexp(first[1], second[1])
    weights = [(part[1] - lse).exp_()[..., None] for part in (first, second)]
    return first[0] * weights[0] + second[0] * weights[1], lse


def settle(output: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Set rows that saw only masked cells to output 0 and log-sum-exp -inf."""
    empty = lse < _EMPTY
    if bool(empty.any()):
        return output.masked_fill(empty[..., None], 0.0), lse.masked_fill(empty, float("-inf"))
    return output, lse
