"""Encode keys with a few bits per channel between the bounds of their page, and estimate logits from the codes.

A page is a run of adjacent columns. Per channel, key = low + code * (high - low) / (2^bits - 1). The bounds are the
smallest and the largest key; beside codes of 2 bits those of a whole page are narrower, since a few keys off the range
cost less than large steps for all. The codes give
approximate logits of all keys and rank the columns for a query, while reading a fraction of the keys' bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from loopserve.kernels import backend
from loopserve.kernels.backend import check_device, check_range
from loopserve.kernels.gpu import limits
from loopserve.kernels.native import key_codes as native

BITS = (2, 4, 8)
_SUMMARISE = backend.operation(
    "summarise_pages",
    reference="key_codes",
    cpu="native.key_codes",
    triton="gpu.key_codes",
    limits={"cpu": native.limit_pages, "triton": limits.summaries},
)
_LOGITS = backend.operation(
    "code_logits",
    reference="key_codes",
    cpu="native.key_codes",
    triton="gpu.key_codes",
    limits={"cpu": native.limit, "triton": limits.codes},
)
_JUMPS = backend.operation(
    "code_jumps",
    reference="key_codes",
    cpu="native.key_codes",
    triton="gpu.key_codes",
    limits={"cpu": native.limit, "triton": limits.jumps},
)
_THRESHOLD = backend.operation(
    "code_threshold",
    reference="key_codes",
    cpu="native.key_codes",
    triton="gpu.key_codes",
    limits={"cpu": native.limit_threshold, "triton": limits.codes},
)


@dataclass(eq=False)
class KeyCodes:
    """Hold the bounds and codes of a layer's keys.

    low, high ``[Hkv, P, D]``: bounds of each page. codes uint8 ``[Hkv, P, page, D * bits / 8]``: byte j holds the
    channels j, j + width, j + 2 width, ..., the first in the lowest bits. Codes after the last column are undefined.
    columns: number of coded keys, which fill some or all of the pages. The owner of the buffers sets it as they change.
    """

    low: Tensor
    high: Tensor
    codes: Tensor
    bits: int
    columns: int
    places: Any = field(
        default=None, init=False, repr=False
    )  # of the compiled kernels: where the buffers lie, once checked


def summarise_pages(
    keys: Tensor, page: int, first: int, low: Tensor, high: Tensor, codes: Tensor | None = None, bits: int = 0
) -> None:
    """Write the bounds, and the codes where given, of the pages from ``first`` on of keys ``[Hkv, n, D]`` into buffers.

    The buffers are laid out as in ``KeyCodes`` and must hold all pages. Raises ValueError for arguments that do not fit
    together.
    """
    heads, total, dim = keys.shape
    if page < 1:
        raise ValueError(f"summarise_pages: page={page} must be at least 1")
    if (
        codes is None
    ):  # a page larger than the number of columns is one page; keeps the size within an int64 of the C kernel
        page = min(page, max(total, 1))
    pages = -(-total // page)
    if low.shape != high.shape or low.shape[0] != heads or low.shape[1] < pages or low.shape[2] != dim:
        raise ValueError(f"summarise_pages: bounds {list(low.shape)} cannot hold {pages} pages of {list(keys.shape)}")
    if codes is not None and (bits not in BITS or dim * bits % 8 or codes.shape[2:] != (page, dim * bits // 8)):
        raise ValueError(f"summarise_pages: codes {list(codes.shape)} do not hold {bits} bits of {dim} channels")
    if not 0 <= first <= pages or {low.dtype, high.dtype} != {keys.dtype}:
        raise ValueError(
            f"summarise_pages: pages of {page} from {first} in {low.dtype} do not fit keys in {keys.dtype}"
        )
    if codes is not None and (codes.dtype != torch.uint8 or codes.shape[0] != heads or codes.shape[1] < pages):
        raise ValueError(f"summarise_pages: codes {codes.dtype} {list(codes.shape)} cannot hold {pages} pages")
    for name, each in (("bounds", low), ("bounds", high), ("codes", codes)):
        if each is not None:
            check_device("summarise_pages", name, each, keys.device)
    _SUMMARISE(keys, page, first, low, high, codes, bits)


def code_logits(queries: Tensor, of: KeyCodes, *, scaling: float) -> Tensor:
    """Return approximate scaled logits of all coded keys for queries ``[Hq, r, D]``: float32 ``[Hkv, group * r,
    columns]``.
    """
    check_codes("code_logits", queries, of)
    found: Tensor = _LOGITS(queries, of, scaling=scaling)
    return found


def code_jumps(
    queries: Tensor,
    of: KeyCodes,
    base: Tensor,
    tail: int,
    budget: int,
    *,
    scaling: float,
    observed: Tensor | None = None,
) -> Tensor:
    """Return the base columns and the ``budget`` best other columns before ``tail``, sorted: int64 ``[Hkv, S +
    budget]``.

    Other columns are ranked by the largest coded logit over the queries ``[Hq, r, D]`` of a group. Of equal ones the
    lowest column wins. base int64 ``[Hkv, S]``: sorted columns below ``tail``. At least ``budget`` other columns must
    exist. observed float32 ``[Hkv, tail]``: the softmax of the queries over all coded columns, averaged over the group,
    is added to it. Raises ValueError for arguments that do not fit together.
    """
    check_codes("code_jumps", queries, of)
    check_base("code_jumps", queries, of, base, tail, budget, observed)
    found: Tensor = _JUMPS(queries, of, base, tail, budget, scaling=scaling, observed=observed)
    return found


def code_threshold(
    queries: Tensor,
    of: KeyCodes,
    base: Tensor,
    tail: int,
    threshold: float,
    least: int,
    most: int,
    *,
    scaling: float,
    softcap: float | None = None,
    observed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the base columns and the other columns before ``tail`` that some query attends to enough, sorted: int64
    ``[Hkv, S + longest]``, left-padded with -1 where a head has fewer, and how many each head has: int64 ``[Hkv]``.

    A column is ranked by its weight: the largest log-softmax over all coded columns of any query ``[Hq, r, D]`` of the
    group. Those of at least ``threshold`` are taken, but at least the ``least`` and at most the ``most`` best per head.
    Of equal ones the lowest column wins. base, observed and errors: see ``code_jumps``; at least ``most`` other columns
    must exist.
    """
    check_codes("code_threshold", queries, of)
    check_base("code_threshold", queries, of, base, tail, most, observed)
    if not 0 <= least <= most:
        raise ValueError(f"code_threshold: at least {least} and at most {most} columns do not fit together")
    found: tuple[Tensor, Tensor] = _THRESHOLD(
        queries, of, base, tail, threshold, least, most, scaling=scaling, softcap=softcap, observed=observed
    )
    return found


def log_weights(logits: Tensor) -> Tensor:
    """Return the weight of each column by logits ``[Hkv, rows, n]``: the largest log-softmax of the rows ``[Hkv, n]``."""
    return (logits - logits.logsumexp(-1, keepdim=True)).amax(1)


def check_base(
    op: str,
    queries: Tensor,
    of: KeyCodes,
    base: Tensor,
    tail: int,
    most: int,
    observed: Tensor | None,
    *,
    look: bool = True,
) -> None:
    """Raise ValueError unless ``most`` columns before ``tail`` can be chosen beside the base.

    look: read the base's numbers too. An implementation that looks at them itself saves the time.
    """
    heads, width = base.shape
    if heads != len(of.low) or base.dtype != torch.long or not 0 <= tail <= of.columns or not 0 <= most <= tail - width:
        raise ValueError(
            f"{op}: {most} more than {base.dtype} {list(base.shape)} before column {tail} of {of.columns} do not fit"
        )
    if observed is not None:
        if observed.shape != (heads, tail) or observed.dtype != torch.float32 or not observed.is_contiguous():
            raise ValueError(f"{op}: observed {list(observed.shape)} must be float32 [{heads}, {tail}], contiguous")
        check_device(op, "observed", observed, queries.device)
    check_device(op, "base", base, queries.device)
    if look and base.device.type == "cpu":  # the compiled kernel writes at these columns
        check_range(f"{op}: base", base, tail)


def check_codes(op: str, queries: Tensor, of: KeyCodes) -> None:
    """Raise ValueError unless queries and codes fit together."""
    heads, pages, dim = of.low.shape
    if queries.dim() != 3 or queries.shape[2] != dim or queries.shape[0] % heads:
        raise ValueError(f"{op}: queries {list(queries.shape)} do not fit codes of {heads} heads and {dim} channels")
    if of.bits not in BITS or of.codes.dim() != 4 or of.codes.shape[3] != dim * of.bits // 8:
        raise ValueError(f"{op}: codes {list(of.codes.shape)} do not hold {of.bits} bits of {dim} channels")
    if of.codes.shape[:2] != (heads, pages) or of.columns > pages * of.codes.shape[2]:
        raise ValueError(f"{op}: codes {list(of.codes.shape)} do not fit {pages} pages and {of.columns} columns")
    if of.high.shape != of.low.shape or of.high.dtype != of.low.dtype or of.codes.dtype != torch.uint8:
        raise ValueError(f"{op}: bounds {of.low.dtype} and {of.high.dtype}, codes {of.codes.dtype} do not fit together")
    for name, each in (("bounds", of.low), ("bounds", of.high), ("codes", of.codes)):
        check_device(op, name, each, queries.device)


def summarise_pages_reference(
    keys: Tensor, page: int, first: int, low: Tensor, high: Tensor, codes: Tensor | None, bits: int
) -> None:
    """Define bounds and codes."""
    fresh = keys[:, first * page :]
    bounds = page_bounds(fresh, page)
    if codes is not None and bits == 2:
        bounds = fitted(fresh, *bounds, page, bits)
    end = first + bounds[0].shape[1]
    low[:, first:end], high[:, first:end] = bounds
    if codes is not None:
        codes[:, first:end] = encode(fresh, *bounds, page, bits)


def fitted(keys: Tensor, low: Tensor, high: Tensor, page: int, bits: int) -> tuple[Tensor, Tensor]:
    """Return bounds ``[Hkv, P, D]`` narrowed to the part of their range, in eighths from 1 to 1 / 2, whose codes have the
    least squared error. Those of a last page that may still grow stay.
    """
    whole = keys.shape[1] // page
    paged = keys[:, : whole * page].float().view(keys.shape[0], whole, page, keys.shape[2])
    lowest, highest = low[:, :whole, None].float(), high[:, :whole, None].float()
    middle, reach = (lowest + highest) * 0.5, (highest - lowest) * 0.5
    low, high, least = low.clone(), high.clone(), None
    eighth, half = reach * 0.125, reach * 0.5  # exact, so that every implementation rounds alike
    for part in (reach, reach - eighth, reach - 2 * eighth, half + eighth, half):
        if least is None:
            a, b = low[:, :whole, None].clone(), high[:, :whole, None].clone()
        else:
            a, b = (middle - part).to(low.dtype), (middle + part).to(low.dtype)
        step = ((b.float() - a.float()) / (2**bits - 1)).clamp(min=torch.finfo(torch.float32).tiny)
        steps = ((paged - a.float()) / step).round().clamp(0, 2**bits - 1)
        error = (steps * step + a.float() - paged).square().sum(2)
        better = torch.ones_like(error, dtype=torch.bool) if least is None else error < least
        least = error if least is None else torch.where(better, error, least)
        low[:, :whole] = torch.where(better, a[:, :, 0], low[:, :whole])
        high[:, :whole] = torch.where(better, b[:, :, 0], high[:, :whole])
    return low, high


def encode(keys: Tensor, low: Tensor, high: Tensor, page: int, bits: int) -> Tensor:
    """Encode keys ``[Hkv, T, D]`` as steps between the bounds ``[Hkv, P, D]`` of their page: packed uint8 ``[Hkv, P,
    page, D * bits / 8]``.
    """
    padded = pad(keys, (0, 0, 0, low.shape[1] * page - keys.shape[1]))
    paged = padded.view(keys.shape[0], -1, page, keys.shape[2]).float()
    step = ((high.float() - low.float()) / (2**bits - 1)).clamp(min=torch.finfo(torch.float32).tiny)
    steps = ((paged - low.float()[:, :, None]) / step[:, :, None]).round().clamp(0, 2**bits - 1).to(torch.uint8)
    parts = steps.chunk(8 // bits, dim=-1)
    packed: Tensor = parts[0].clone()
    for place, part in enumerate(parts[1:], 1):
        packed |= part << (bits * place)
    return packed


def unpack(packed: Tensor, bits: int) -> Tensor:
    """Return the codes in packed bytes as uint8; the last dimension is ``8 / bits`` times as long."""
    return torch.cat([(packed >> (bits * place)) & (2**bits - 1) for place in range(8 // bits)], dim=-1)


def code_logits_reference(queries: Tensor, of: KeyCodes, *, scaling: float) -> Tensor:
    """Define coded logits: products with the decoded keys."""
    low, high = of.low.float(), of.high.float()
    heads, pages, channels = low.shape
    grouped = queries.float().reshape(heads, 1, -1, channels)
    step = (high - low) / (2**of.bits - 1)
    inside = unpack(of.codes, of.bits).float() @ (grouped * step[:, :, None]).transpose(
        2, 3
    )  # [Hkv, pages, page, rows]
    found: Tensor = inside + low[:, :, None] @ grouped.transpose(2, 3)
    return found.view(heads, pages * of.codes.shape[2], -1)[:, : of.columns].transpose(1, 2) * scaling


def code_jumps_reference(
    queries: Tensor, of: KeyCodes, base: Tensor, tail: int, budget: int, *, scaling: float, observed: Tensor | None
) -> Tensor:
    """Define the ranking of columns: sort by the largest logit."""
    logits = code_logits_reference(queries, of, scaling=scaling)
    if observed is not None:
        observed += logits.softmax(-1).mean(1)[:, :tail]
    ranked = logits.amax(1)[:, :tail].scatter(1, base, float("-inf"))
    best = ranked.argsort(dim=1, descending=True, stable=True)[:, :budget]
    return torch.cat([base, best], dim=1).sort(dim=1).values


def code_threshold_reference(
    queries: Tensor, of: KeyCodes, base: Tensor, tail: int, threshold: float, least: int, most: int, **options: Any
) -> tuple[Tensor, Tensor]:
    """Define the choice of columns: sort by weight."""
    logits = code_logits_reference(queries, of, scaling=options.pop("scaling"))
    return heavy_columns(logits, base, tail, threshold, least, most, **options)


def heavy_columns(
    logits: Tensor,
    base: Tensor,
    tail: int,
    threshold: float,
    least: int,
    most: int,
    *,
    softcap: float | None,
    observed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return the result of ``code_threshold`` from coded logits ``[Hkv, rows, columns]``."""
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    if observed is not None:
        observed += logits.softmax(-1).mean(1)[:, :tail]
    weights = log_weights(logits)[:, :tail].nan_to_num(nan=float("-inf"), neginf=float("-inf"))
    weights = weights.scatter(1, base, float("-inf"))
    counts = (weights >= threshold).sum(1, keepdim=True).clamp(least, most)
    longest = int(counts.max())
    best = weights.argsort(dim=1, descending=True, stable=True)[:, :longest]
    best = best.masked_fill(torch.arange(longest, device=best.device) >= counts, -1)
    return torch.cat([base, best], dim=1).sort(dim=1).values, counts[:, 0] + base.shape[1]


def page_bounds(keys: Tensor, page: int) -> tuple[Tensor, Tensor]:
    """Return the smallest and the largest value of each key channel per page of ``page`` columns, two ``[Hkv, P, D]``;
    the last page may be partial.
    """
    if page < 1 or keys.dim() != 3 or keys.shape[1] == 0:
        raise ValueError(
            f"page_bounds: needs keys [Hkv, n, D] with n > 0 and a page > 0, got {list(keys.shape)} and {page}"
        )
    whole = keys.shape[1] // page * page
    pages = keys[:, :whole].reshape(keys.shape[0], -1, page, keys.shape[2])
    low, high = pages.amin(2), pages.amax(2)
    if whole < keys.shape[1]:
        rest = keys[:, whole:]
        low = torch.cat([low, rest.amin(1, keepdim=True)], dim=1)
        high = torch.cat([high, rest.amax(1, keepdim=True)], dim=1)
    return low, high


def page_scores(queries: Tensor, low: Tensor, high: Tensor, *, scaling: float) -> Tensor:
    """Return an upper bound of the scaled score of any key of a page: float32 ``[Hkv, P]``.

    Per query and channel the larger of query * low and query * high is taken and summed over channels. The result is
    the maximum over the queries ``[Hq, t, D]`` and over the query heads of a group, so that a page is kept if one of
    them needs it.
    """
    if low.dim() != 3 or low.shape != high.shape or queries.dim() != 3 or queries.shape[0] % low.shape[0]:
        raise ValueError(
            f"page_scores: queries {list(queries.shape)}, low {list(low.shape)}, high {list(high.shape)} do not fit"
        )
    rows = queries.float().reshape(low.shape[0], -1, queries.shape[2])
    # A positive query channel has its largest product with the largest key, a negative one with the smallest.
    bound = rows.clamp(min=0) @ high.float().transpose(1, 2) + rows.clamp(max=0) @ low.float().transpose(1, 2)
    return bound.amax(1) * scaling
