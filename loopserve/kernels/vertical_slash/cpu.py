"""Compute line attention with the compiled C kernel."""

from __future__ import annotations

from torch import Tensor

from loopserve.kernels.native.attention import attend, serves


def limit(queries: Tensor, keys: Tensor, values: Tensor, *_: Tensor, softcap: float | None, **__: object) -> str | None:
    """Return why the kernel cannot serve these arguments, or None."""
    return serves(queries, values, softcap)


def vertical_slash(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    verticals: Tensor,
    slashes: Tensor,
    *,
    scaling: float,
    softcap: float | None,
    first_valid: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See the package."""
    return attend(queries, keys, values, scaling=scaling, lines=(verticals, slashes), first_valid=first_valid)
