"""Run scoring and exact greedy selection with the compiled C kernel, one head at a time."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from loopserve.kernels.native import scores
from loopserve.kernels.native.lines import select


def limit(queries: Tensor, keys: Tensor, *_: object, softcap: float | None, **__: object) -> str | None:
    """Return why the kernel cannot serve these arguments, or None."""
    return scores.serves(queries, keys, softcap)


def choose_lines(
    queries: Tensor, keys: Tensor, columns: Tensor, new_tokens: int, *, softcap: float | None, **options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return chosen lines bool ``[Hq, 2, n]``, covered and total mass per row ``[Hq, r]``, cost ``[Hq]``.

    See the package.
    """
    return select(columns, new_tokens, queries=queries, keys=keys, **options)
