"""Count which parts of a conversation the decode steps of one answer attend to."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor


class AttentionMap:
    """Count the pairs attended per decode step and per bucket of the conversation, summed over KV heads and layers.

    A bucket is a range of positions: those between two edges, and a last one for everything behind the last edge. Layers that
    no policy touches (sliding windows) are left out. Set it as ``Session.attention_map`` before the answer begins. What steps attend
    to must reach at least to the last edge.
    """

    def __init__(self, edges: Sequence[int]) -> None:
        """edges: rising positions, the first of them 0."""
        self.edges = list(edges)
        if not self.edges or self.edges[0] != 0 or any(end <= start for start, end in pairwise(self.edges)):
            raise ValueError(f"edges must rise from 0, got {self.edges[:8]}")
        self.attended: list[list[int]] = []  # by step, then bucket
        self._heads: list[int] = []  # by step: KV heads, summed over layers
        self._seen: list[int] = []  # by step: tokens stored
        self._counted: dict[int, tuple[Tensor | None, int, list[int]]] = {}  # by layer: selection, boundary, counts

    @property
    def steps(self) -> int:
        return len(self.attended)

    def add(self, layer: int, selected: Tensor | None, boundary: int, heads: int, seen: int) -> None:
        """Count one layer of one decode step.

        selected int64 ``[Hkv, S]``: positions attended below ``boundary``, -1 for none; None stands for every one. Pairs from
        the boundary up to ``seen`` are attended by every head.
        """
        if selected is None:
            boundary = 0
        if not self._seen or seen != self._seen[-1]:
            self.attended.append([0] * len(self.edges))
            self._heads.append(0)
            self._seen.append(seen)
        known = self._counted.get(layer)
        if known is None or known[0] is not selected or known[1] != boundary:
            # Most steps keep the selection of the step before: its tensor is counted once.
            known = selected, boundary, self._count(selected, boundary, heads)
            self._counted[layer] = known
        row = [mine + more for mine, more in zip(self.attended[-1], known[2], strict=True)]
        row[-1] += heads * max(0, seen - max(boundary, self.edges[-1]))
        self.attended[-1] = row
        self._heads[-1] += heads

    @property
    def dense(self) -> list[list[int]]:
        """Return the pairs that dense attention without eviction would attend to, by step, then bucket."""
        return self._dense(slice(None))

    def _dense(self, steps: slice) -> list[list[int]]:
        sizes = [end - start for start, end in pairwise(self.edges)]
        return [
            [heads * size for size in (*sizes, seen - self.edges[-1])]
            for heads, seen in zip(self._heads[steps], self._seen[steps], strict=True)
        ]

    def _count(self, selected: Tensor | None, boundary: int, heads: int) -> list[int]:
        """Return the pairs of a selection by bucket, with those from the boundary on in all buckets but the last."""
        counts = [0] * len(self.edges)
        if selected is not None and selected.numel():
            edges = torch.tensor(self.edges, dtype=torch.long, device="cpu")
            found = torch.bucketize(selected[selected >= 0].cpu(), edges, right=True) - 1
            counts = torch.bincount(found, minlength=len(self.edges)).tolist()
        for bucket, (start, end) in enumerate(pairwise(self.edges)):
            counts[bucket] += heads * max(0, end - max(start, boundary))
        return counts

    def shares(self, most_rows: int) -> list[list[float | None]]:
        """Return the share of each bucket's pairs that was attended, in at most ``most_rows`` rows of consecutive steps.

        None stands for a bucket that held no pair yet.
        """
        size = -(-self.steps // most_rows) if self.steps else 1
        return [self._share(slice(start, start + size)) for start in range(0, self.steps, size)]

    def share(self) -> list[float | None]:
        """Return the share of each bucket's pairs that was attended, over all steps."""
        return self._share(slice(None))

    def last(self) -> list[float | None]:
        """Return the shares of the latest step."""
        return self._share(slice(self.steps - 1, None))

    def _share(self, steps: slice) -> list[float | None]:
        attended = [sum(column) for column in zip(*self.attended[steps], strict=True)]
        dense = [sum(column) for column in zip(*self._dense(steps), strict=True)]
        return [mine / whole if whole else None for mine, whole in zip(attended, dense, strict=True)]


def bucket_edges(ends: Sequence[int], most: int, smallest: int = 8) -> list[int]:
    """Return at most ``most`` rising edges for ``AttentionMap``; the last is the end of the conversation.

    ends: number of tokens at the end of each turn. Buckets do not cross the ends of turns as long as there are enough of them.
    smallest: tokens below which a part of a turn is not divided further.
    """
    total = ends[-1]
    borders = sorted({0, *ends})
    pieces = most - 1
    if len(borders) - 1 > pieces:
        edges = {round(total * number / pieces) for number in range(pieces + 1)}
        return sorted(edges)[:most]
    spare = pieces - (len(borders) - 1)
    edges = set(borders)
    for start, end in pairwise(borders):
        count = max(1, min(1 + spare * (end - start) // total, (end - start) // smallest))
        edges |= {start + (end - start) * number // count for number in range(count)}
    return sorted(edges)


def bucket_turn(ends: Sequence[int], position: int) -> int:
    """Return the number of the turn that a position belongs to."""
    return bisect_left(ends, position + 1)
