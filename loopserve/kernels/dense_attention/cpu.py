"""Run dense attention with the compiled C kernels."""

from __future__ import annotations

from torch import Tensor

from loopserve.kernels.native.attention import ROWS, attend, serves

FEW = 16  # query rows per KV head up to which cells are computed one by one, with channels in the vector lanes


def limit(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    softcap: float | None,
    window: int | None = None,
    columns: Tensor | None = None,
    **_: object,
) -> str | None:
    """Return why the kernel cannot serve these arguments, or None."""
    if columns is not None:
        return "rows that stand anywhere"
    if window is not None and window < min(ROWS, keys.shape[1]):
        return f"a window of {window}"
    return serves(queries, values, softcap)


def dense_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    scaling: float,
    softcap: float | None = None,
    window: int | None = None,
    columns: Tensor | None = None,
    first_valid: Tensor | None = None,
    need_lse: bool = True,
) -> tuple[Tensor, Tensor]:
    """See the package. The log-sum-exp has no extra cost here and is always returned."""
    few = queries.shape[0] // keys.shape[0] * queries.shape[1] <= FEW
    if few and window is not None:  # each later row leaves out one more column than the first row
        few = window >= keys.shape[1]
    kernel = "decode_attention" if few else "vertical_slash"
    return attend(queries, keys, values, scaling=scaling, kernel=kernel, window=window, first_valid=first_valid)
