"""Choose, by codes of the keys, the columns that several sessions of one layer attend to in a decode step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from loopserve.kernels import backend
from loopserve.kernels.backend import check_device, check_range
from loopserve.kernels.key_codes import (
    KeyCodes,
    check_base,
    check_codes,
    code_jumps,
    code_jumps_reference,
    code_threshold,
    code_threshold_reference,
    summarise_pages,
    summarise_pages_reference,
)
from loopserve.kernels.native import key_codes as native

_OPERATION = backend.operation(
    "choose_columns",
    torch="choose_columns",
    cpu="native.key_codes",
    triton="choose_columns:choose_columns_torch",  # the single operations, which run as Triton there
    any_device=True,
    limits={"cpu": native.limit_choices},
)


class ColumnChoice(NamedTuple):
    """Hold one session's choice: base columns, and the best others before ``tail``.

    queries ``[Hq, r, D]``, of, base int64 ``[Hkv, S]``, tail, observed: as in ``code_jumps``. most: other columns, at most.
    threshold: None takes the ``most`` best by logit, as ``code_jumps`` does; a log-weight takes those that reach it, but at
    least the ``least`` and at most the ``most`` best, as ``code_threshold`` does. keys ``[Hkv, columns, D]``: where given,
    their pages from ``first`` on are summarised into the buffers of ``of`` first.
    """

    queries: Tensor
    of: KeyCodes
    base: Tensor
    tail: int
    most: int
    least: int = 0
    threshold: float | None = None
    observed: Tensor | None = None
    keys: Tensor | None = None
    first: int = 0


def choose_columns(
    choices: Sequence[ColumnChoice], *, scaling: float, softcap: float | None = None, checked: bool = False
) -> list[tuple[Tensor, list[int]]]:
    """Return each session's columns, sorted: int64 ``[Hkv, longest]``, left-padded with -1 where a head has fewer, and
    how many each head has.

    One kernel call serves all sessions; none of them changes another's result. checked: ``check_choice`` has been called
    for each. Raises ValueError that names the choice whose arguments do not fit together.
    """
    if not choices:
        return []
    if not checked:
        for index, each in enumerate(choices):
            check_choice(each, f"choose_columns: choice {index}")
    _check_alike(choices)
    found: list[tuple[Tensor, list[int]]] = _OPERATION(choices[0].queries, choices, scaling=scaling, softcap=softcap)
    return found


def _check_alike(choices: Sequence[ColumnChoice]) -> None:
    """Raise ValueError that names a choice of another layer than the first: scratch memory is laid out for one shape."""
    first = choices[0]
    for index, each in enumerate(choices):
        heads, _, dim = each.of.low.shape
        alike = each.queries.shape[0] == first.queries.shape[0] and heads == first.of.low.shape[0]
        if not alike or dim != first.of.low.shape[2] or each.queries.device != first.queries.device:
            raise ValueError(
                f"choose_columns: choice {index} has {_described(each)}; choice 0, of the same layer, has {_described(first)}"
            )


def _described(choice: ColumnChoice) -> str:
    queries, bounds = choice.queries, choice.of.low
    return f"queries {list(queries.shape)} on {queries.device} and bounds {list(bounds.shape)}"


def check_choice(choice: ColumnChoice, op: str, *, coded: bool = False) -> None:
    """Raise ValueError unless the arguments of a choice fit together. The base's numbers are not read.

    coded: the codes are known to be those of ``keys``, and of the layer that the queries belong to.
    """
    queries, of, base, tail, most, least, _threshold, observed, keys, first = choice
    if not coded:
        check_codes(op, queries, of)
    check_base(op, queries, of, base, tail, most, observed, look=False)
    if not 0 <= least <= most:
        raise ValueError(f"{op}: at least {least} and at most {most} columns do not fit together")
    if keys is not None and not coded:
        heads, _, dim = of.low.shape
        pages = -(-of.columns // of.codes.shape[2])
        if keys.shape != (heads, of.columns, dim) or keys.dtype is not of.low.dtype or not 0 <= first <= pages:
            raise ValueError(
                f"{op}: keys {keys.dtype} {list(keys.shape)} from page {first} on do not fit codes of {of.columns} columns, "
                f"{pages} pages, bounds {of.low.dtype}"
            )
        check_device(op, "keys", keys, queries.device)


def choose_columns_torch(
    _: Tensor, choices: Sequence[ColumnChoice], *, scaling: float, softcap: float | None
) -> list[tuple[Tensor, list[int]]]:
    """Choose for one session after another, by the fastest implementations of the single operations."""
    return _one_by_one(choices, scaling, softcap, summarise_pages, code_jumps, code_threshold)


def choose_columns_reference(
    _: Tensor, choices: Sequence[ColumnChoice], *, scaling: float, softcap: float | None
) -> list[tuple[Tensor, list[int]]]:
    """Define the choice by the references of the single operations."""
    single = summarise_pages_reference, code_jumps_reference, code_threshold_reference
    for each in choices:
        check_range("choose_columns: base", each.base, each.tail)
    return _one_by_one(choices, scaling, softcap, *single)


def _one_by_one(
    choices: Sequence[ColumnChoice],
    scaling: float,
    softcap: float | None,
    summarise: Callable[..., None],
    jumps: Callable[..., Tensor],
    heavy: Callable[..., tuple[Tensor, Tensor]],
) -> list[tuple[Tensor, list[int]]]:
    found = []
    for queries, of, base, tail, most, least, threshold, observed, keys, first in choices:
        if keys is not None:
            summarise(keys, of.codes.shape[2], first, of.low, of.high, of.codes, of.bits)
        if threshold is None:
            columns = jumps(queries, of, base, tail, most, scaling=scaling, observed=observed)
            counts = [columns.shape[1]] * len(columns)
        else:
            options = {"scaling": scaling, "softcap": softcap, "observed": observed}
            columns, lengths = heavy(queries, of, base, tail, threshold, least, most, **options)
            counts = lengths.tolist()
        found.append((columns, counts))
    return found
