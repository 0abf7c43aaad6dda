"""Compute token scores with the compiled C kernel."""

from __future__ import annotations

from torch import Tensor

from loopserve.kernels.native import scores


def limit(queries: Tensor, keys: Tensor, *_: Tensor, softcap: float | None, over_rows: str, **__: object) -> str | None:
    """Return why the kernel cannot serve these arguments, or None."""
    return scores.serves_join(queries, keys, softcap, over_rows)


def token_scores(
    queries: Tensor,
    keys: Tensor,
    columns: Tensor,
    *,
    scaling: float,
    softcap: float | None,
    first_valid: Tensor | None,
    over_rows: str,
) -> Tensor:
    """See the package."""
    return scores.token_scores(queries, keys, columns, scaling=scaling, first_valid=first_valid, over_rows=over_rows)
