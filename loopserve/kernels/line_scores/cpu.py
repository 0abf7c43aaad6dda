"""Compute line masses with the compiled C kernel."""

from __future__ import annotations

from torch import Tensor

from loopserve.kernels.native import scores


def limit(queries: Tensor, keys: Tensor, *_: Tensor, softcap: float | None, **__: object) -> str | None:
    """Return why the kernel cannot serve these arguments, or None."""
    return scores.serves(queries, keys, softcap)


def line_scores(
    queries: Tensor, keys: Tensor, columns: Tensor, *, scaling: float, softcap: float | None, first_valid: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """See the package."""
    return scores.line_scores(queries, keys, columns, scaling=scaling, first_valid=first_valid)
