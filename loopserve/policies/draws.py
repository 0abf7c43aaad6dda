"""Draw rows by a seed: the same seed, turn, layer and length give the same rows, independent of other draws of the program.

No global random state is read or written, so sessions that run at the same time do not change each other's draws.
"""

from __future__ import annotations

import hashlib
from enum import StrEnum

import torch
from torch import Tensor

SAMPLED_ROWS = (
    "sampled_rows"  # scratch key of an attention call: the rows its sparsifier drew, for a compressor to use again
)


class Sampling(StrEnum):
    """Name how rows of a turn are drawn."""

    UNIFORM = "uniform"  # without replacement, all rows equally likely
    STRATIFIED = "stratified"  # one row from each of as many segments of equal size
    LAST = "last"  # the last rows only, as MInference does
    MIXED = "mixed"  # half last rows, half uniform among the rest


def generator(*key: int) -> torch.Generator:
    """Return a CPU generator that depends on the numbers of ``key`` only."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


def uniform_rows(candidates: Tensor, count: int, source: torch.Generator) -> Tensor:
    """Return ``min(count, len(candidates))`` of the candidates, without replacement, sorted: int64."""
    chosen = torch.randperm(len(candidates), generator=source, device="cpu")[:count]
    return candidates[chosen.to(candidates.device)].sort().values


def sample_rows(total: int, count: int, sampling: Sampling, source: torch.Generator) -> Tensor:
    """Return sorted, distinct rows of ``0 .. total - 1``: int64 ``[min(count, total)]`` on the CPU."""
    rows = torch.arange(total, device="cpu")
    if count >= total:
        return rows
    if sampling is Sampling.LAST:
        return rows[-count:]
    if sampling is Sampling.STRATIFIED:
        edges = torch.linspace(0, total, count + 1, dtype=torch.float64, device="cpu").round().long()
        widths = edges[1:] - edges[:-1]
        inside = (torch.rand(count, generator=source, dtype=torch.float64, device="cpu") * widths).long()
        return edges[:-1] + inside.clamp(max=widths - 1)
    if sampling is Sampling.MIXED:
        last = count // 2
        return torch.cat([uniform_rows(rows[: total - last], count - last, source), rows[total - last :]])
    return uniform_rows(rows, count, source)
