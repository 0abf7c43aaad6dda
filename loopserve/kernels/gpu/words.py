"""Store flags as overlapping 64-bit words, so that a kernel reads 64 flags from any position in two loads."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from loopserve.kernels.gpu.launch import launch

WORD_PADDING = 256  # unset flags before and after those of a head, so that a window may begin or end outside


@triton.jit(do_not_specialize=["total", "word_count"])
def words_kernel(
    flags: tl.tensor,
    words: tl.tensor,
    total: tl.tensor,
    word_count: tl.tensor,
    PADDING: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Pack flags bool ``[H, n]`` into overlapping words. Grid: blocks of words, heads."""
    head = tl.program_id(1)
    word = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    bit = tl.arange(0, 64)
    place = word[:, None] * 32 + bit[None, :] - PADDING
    inside = (place >= 0) & (place < total)
    flag = tl.load(flags + head.to(tl.int64) * total + place, mask=inside, other=0).to(tl.int64)
    tl.store(
        words + head.to(tl.int64) * word_count + word,
        tl.sum(flag << bit.to(tl.int64)[None, :], 1),
        mask=word < word_count,
    )


def flag_words(flags: Tensor) -> Tensor:
    """Return flags bool ``[H, n]`` as int64 ``[H, W]``: word w holds 64 flags from ``32 * w - WORD_PADDING`` on."""
    flags = flags.contiguous()
    heads, total = flags.shape
    count = (total + 2 * WORD_PADDING) // 32
    words = torch.empty(heads, count, dtype=torch.int64, device=flags.device)
    launch(
        words_kernel,
        (-(-count // 32), heads),
        flags.view(torch.uint8),
        words,
        total,
        count,
        PADDING=WORD_PADDING,
        BLOCK=32,
        num_warps=4,
    )
    return words


@triton.jit
def window(words: tl.tensor, start: tl.tensor, PADDING: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """Return the 64 flags from ``start`` on (one position or a vector) as two int32."""
    place = start + PADDING
    shift = (place & 31).to(tl.int64)
    low = (tl.load(words + (place >> 5)) >> shift).to(tl.int32)
    high = (tl.load(words + (place >> 5) + 1) >> shift).to(tl.int32)
    return low, high
