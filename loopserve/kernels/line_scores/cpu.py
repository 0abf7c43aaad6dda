"""Line masses by the compiled kernel."""

from __future__ import annotations

from torch import Tensor

from loopserve.kernels.native import scores


def limit(queries: Tensor, keys: Tensor, *_: Tensor, softcap: float | None, **__: object) -> str | None:
    """What it cannot serve."""
    return scores.serves(queries, keys, softcap)


def line_scores(
    queries: Tensor, keys: Tensor, columns: Tensor, *, scaling: float, softcap: float | None, first_valid: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """See the package."""
    return scores.line_scores(queries, keys, columns, scaling=scaling, first_valid=first_valid)
