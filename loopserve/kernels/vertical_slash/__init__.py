"""Attention of new queries on the exact union of vertical and slash lines, line sets differing per head."""

from __future__ import annotations

from torch import Tensor

from loopserve.kernels import backend
from loopserve.kernels.shapes import check
from loopserve.kernels.vertical_slash import cpu, reference

_OPERATION = backend.operation("vertical_slash", reference=reference.vertical_slash, cpu=cpu.vertical_slash)


def vertical_slash(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    verticals: Tensor,
    slashes: Tensor,
    *,
    scaling: float,
    softcap: float | None = None,
    first_valid: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(output ``[Hq, Tq, D]``, log-sum-exp ``[Hq, Tq]``) of end-aligned queries over the cells of the chosen lines.

    verticals, slashes: bool ``[Hq, Tk]``, by key column and by offset (query column minus key column). A row without a cell
    gives 0 and -inf. ValueError for shapes that do not fit.
    """
    check("vertical_slash", queries, keys, values)
    wanted = (queries.shape[0], keys.shape[1])
    if verticals.shape != wanted or slashes.shape != wanted:
        raise ValueError(
            f"vertical_slash: lines {list(verticals.shape)} and {list(slashes.shape)} must be {list(wanted)}"
        )
    output: tuple[Tensor, Tensor] = _OPERATION.pick(queries)(
        queries, keys, values, verticals, slashes, scaling=scaling, softcap=softcap, first_valid=first_valid
    )
    return output
