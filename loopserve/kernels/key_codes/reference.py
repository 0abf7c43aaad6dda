"""Define key codes, coded logits and the ranking of columns."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

from loopserve.kernels.page_bounds import page_bounds

if TYPE_CHECKING:
    from loopserve.kernels.key_codes.layout import KeyCodes


def summarise_pages(
    keys: Tensor, page: int, first: int, low: Tensor, high: Tensor, codes: Tensor | None, bits: int
) -> None:
    """See the package."""
    fresh = keys[:, first * page :]
    bounds = page_bounds(fresh, page)
    end = first + bounds[0].shape[1]
    low[:, first:end], high[:, first:end] = bounds
    if codes is not None:
        codes[:, first:end] = encode(fresh, *bounds, page, bits)


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


def code_logits(queries: Tensor, of: KeyCodes, *, scaling: float) -> Tensor:
    """See the package."""
    low, high = of.low.float(), of.high.float()
    heads, pages, channels = low.shape
    grouped = queries.float().reshape(heads, 1, -1, channels)
    step = (high - low) / (2**of.bits - 1)
    inside = unpack(of.codes, of.bits).float() @ (grouped * step[:, :, None]).transpose(
        2, 3
    )  # [Hkv, pages, page, rows]
    found: Tensor = inside + low[:, :, None] @ grouped.transpose(2, 3)
    return found.view(heads, pages * of.codes.shape[2], -1)[:, : of.columns].transpose(1, 2) * scaling


def code_jumps(
    queries: Tensor, of: KeyCodes, base: Tensor, tail: int, budget: int, *, scaling: float, observed: Tensor | None
) -> Tensor:
    """See the package."""
    logits = code_logits(queries, of, scaling=scaling)
    if observed is not None:
        observed += logits.softmax(-1).mean(1)[:, :tail]
    ranked = logits.amax(1)[:, :tail].scatter(1, base, float("-inf"))
    best = ranked.argsort(dim=1, descending=True, stable=True)[:, :budget]
    return torch.cat([base, best], dim=1).sort(dim=1).values
