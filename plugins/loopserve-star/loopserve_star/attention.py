"""Compute star attention block by block, each a small dense attention over the keys of the anchor and of the block.

On a GPU with Triton one kernel computes all blocks (``triton_attention``).
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

import torch
from torch import Tensor

from loopserve.kernels.dense_attention import dense_attention


def star_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    block: int,
    anchor: int,
    whole: int,
    *,
    scaling: float,
    softcap: float | None = None,
    first_valid: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return output ``[Hq, T, D]`` and log-sum-exp float32 ``[Hq, T]`` of queries ``[Hq, T, D]``, the last T columns of
    keys ``[Hkv, n, D]``.

    block, anchor, whole: as in ``StarPattern``. first_valid ``[Hkv]``: columns before it are filler and never attended.
    """
    compute = in_blocks
    if queries.is_cuda and keys.shape == values.shape and find_spec("triton") is not None:
        from loopserve_star.triton_attention import in_tiles

        compute = in_tiles
    return compute(
        queries, keys, values, block, anchor, whole, scaling=scaling, softcap=softcap, first_valid=first_valid
    )


def in_blocks(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    block: int,
    anchor: int,
    whole: int,
    *,
    scaling: float,
    softcap: float | None = None,
    first_valid: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the result of ``star_attention`` on any device, by one call of dense attention per block."""
    total = keys.shape[1]
    history = total - queries.shape[1]
    outputs, sums = [], []
    for first, end, begin in _pieces(history, total, block, anchor, whole):
        seen, held, filler = keys[:, :end], values[:, :end], first_valid
        if begin:
            seen = torch.cat([keys[:, :anchor], keys[:, begin:end]], dim=1)
            held = torch.cat([values[:, :anchor], values[:, begin:end]], dim=1)
            if (
                first_valid is not None
            ):  # filler is on the left: a block contains some only if the whole anchor is filler
                filler = first_valid.clamp(max=anchor) + (first_valid - begin).clamp(min=0)
        output, lse = dense_attention(
            queries[:, first - history : end - history],
            seen,
            held,
            scaling=scaling,
            softcap=softcap,
            first_valid=filler,
            need_lse=True,
        )
        assert lse is not None
        outputs.append(output)
        sums.append(lse)
    return torch.cat(outputs, dim=1), torch.cat(sums, dim=1)


def _pieces(history: int, total: int, block: int, anchor: int, whole: int) -> Iterator[tuple[int, int, int]]:
    """Yield rows from column ``first`` to ``end`` that see the anchor and the columns from ``begin`` on; 0: all
    columns.
    """
    border = max(total - whole, history)
    first = history
    while first < border:
        begin = first // block * block
        end = min(begin + block, border)
        yield first, end, begin if begin > anchor else 0
        first = end
    if border < total:
        yield border, total, 0
