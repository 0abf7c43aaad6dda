"""Measure a choice of lines: the fewest lines for a share of the mass, overlap of choices, coverage by row."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from loopserve.bench.heads import Heads
from loopserve.core.policy.patterns import AttentionPattern
from loopserve.kernels.line_scores import line_scores

_ROWS = 512  # rows whose softmax is held at once where all rows are looked at


def softmax_rows(heads: Heads, head: int | None = None) -> tuple[Tensor, Tensor]:
    """All rows' attention: probabilities ``[Hq, m, n]`` (of one query head if named: ``[1, m, n]``) and their columns."""
    queries, keys = heads.queries, heads.keys
    if head is not None:
        owner = head // (queries.shape[0] // keys.shape[0])
        queries, keys = queries[head : head + 1], keys[owner : owner + 1]
    columns = torch.arange(heads.history, keys.shape[1], device="cpu")
    parts = [
        line_scores(queries[:, rows], keys, columns[rows], scaling=heads.scaling).probabilities
        for rows in torch.arange(queries.shape[1], device="cpu").split(_ROWS)
    ]
    return torch.cat(parts, dim=1), columns


def fewest_lines(probabilities: Tensor, alphas: Sequence[float]) -> list[Tensor]:
    """For each share of the mass, lines taken one by one, the heaviest of what is left first, every line costing one.

    probabilities ``[m, n]``: all rows of a block, the last m of n columns; not changed. Returns verticals and slashes, bool
    ``[2, n]``, for each share in rising order. Cells that two lines share count once. The greedy gives no proof that fewer
    lines would not do: it is an upper bound. Ties: verticals first, then the lower line.
    """
    left = probabilities.clone()
    new, total = left.shape
    history = total - new
    vertical = left.double().sum(0)
    slash = torch.zeros(total, dtype=torch.float64, device="cpu")
    for row in range(new):
        slash[: history + row + 1] += left[row, : history + row + 1].flip(0)
    whole = float(vertical.sum())
    chosen = torch.zeros(2, total, dtype=torch.bool, device="cpu")
    found: list[Tensor] = []
    covered = 0.0
    for alpha in sorted(alphas):
        while covered < alpha * whole - 1e-9 * whole:
            best_vertical, best_slash = int(vertical.argmax()), int(slash.argmax())
            if vertical[best_vertical] <= 0 and slash[best_slash] <= 0:
                break  # rounding has left nothing to take
            if vertical[best_vertical] >= slash[best_slash]:
                line, start = best_vertical, max(0, best_vertical - history)
                cells = left[start:, line]
                slash[history + start - line : total - line] -= cells
                covered += float(cells.double().sum())
                chosen[0, line] = True
                vertical[line] = 0.0
            else:
                line, start = best_slash, max(0, best_slash - history)
                cells = left.diagonal(history - line)
                vertical[history + start - line : total - line] -= cells
                covered += float(cells.double().sum())
                chosen[1, line] = True
                slash[line] = 0.0
            cells.zero_()
        found.append(chosen.clone())
    return found


def jaccard(first: Tensor, second: Tensor) -> Tensor:
    """Shared over all of two choices bool ``[Hq, k]``; 1 where both are empty: float32 ``[Hq]``."""
    either = (first | second).sum(1)
    return torch.where(either > 0, (first & second).sum(1).float() / either.clamp(min=1), 1.0)


def chance(first: Tensor, second: Tensor) -> Tensor:
    """The overlap that choices of the same sizes would have if drawn at random, about: float32 ``[Hq]``."""
    sizes, others = first.sum(1).float(), second.sum(1).float()
    shared = sizes * others / first.shape[1]
    return torch.where(sizes + others > 0, shared / (sizes + others - shared).clamp(min=1e-9), 1.0)


def row_coverage(pattern: AttentionPattern, probabilities: Tensor, columns: Tensor) -> Tensor:
    """Share of each row's mass inside a pattern: float32 ``[Hq, r]``."""
    return (probabilities * pattern.rows(columns)).sum(2) / probabilities.sum(2).clamp(min=1e-30)


def worst_tenth(coverage: Tensor) -> Tensor:
    """Mean over the tenth of the rows ``[Hq, r]`` that a pattern serves worst, at least one: ``[Hq]``."""
    count = -(-coverage.shape[1] // 10)
    return coverage.topk(count, dim=1, largest=False).values.mean(1)
