"""Run block-sparse attention with the compiled C kernel."""

from __future__ import annotations

from torch import Tensor

from loopserve.kernels.native.attention import attend, serves


def limit(
    queries: Tensor, keys: Tensor, values: Tensor, blocks: Tensor, *, softcap: float | None, **_: object
) -> str | None:
    """Return why the kernel cannot serve these arguments, or None."""
    return serves(queries, values, softcap)


def block_sparse(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    blocks: Tensor,
    *,
    tile: int,
    scaling: float,
    softcap: float | None,
    first_valid: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See the package."""
    return attend(
        queries,
        keys,
        values,
        scaling=scaling,
        kernel="block_sparse",
        window=tile,
        blocks=blocks,
        first_valid=first_valid,
    )
