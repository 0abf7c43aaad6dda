"""Select lines as the preset does, and verify a selection."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from loopserve.bench.heads import Heads
from loopserve.bench.speed.parity import Verdict
from loopserve.core.policy.patterns import LinePattern
from loopserve.kernels import backend
from loopserve.kernels.choose_lines import choose_lines
from loopserve.kernels.line_scores import line_scores
from loopserve.kernels.select_lines import LineSelection, select_lines
from loopserve.policies.draws import Sampling, generator, sample_rows

_SINKS, _LOCAL = 4, 64
_CUT = 2048  # tokens on which the greedy is compared with the line-by-line one, which is slow
_CUT_ROWS = 64  # number of their rows that select
_COST_SLACK = 0.05


def of_kv_head(heads: Heads, kv: int) -> Heads:
    """Return one KV head with its query heads."""
    group = heads.queries.shape[0] // heads.keys.shape[0]
    return Heads(
        heads.queries[kv * group : (kv + 1) * group], heads.keys[kv : kv + 1], heads.values[kv : kv + 1], heads.data
    )


def select(probabilities: Tensor, columns: Tensor, new: int, alpha: float) -> LineSelection:
    """Select as the preset does: sinks and a local window are forced, lines cost the tiles that a kernel adds for them."""
    return select_lines(
        probabilities,
        columns,
        new,
        **_as_the_preset(alpha, len(probabilities), probabilities.shape[2], probabilities.device),
    )


def choose(heads: Heads, rows: Tensor, alpha: float) -> LineSelection:
    """Select from the queries themselves."""
    queries, new = heads.queries[:, rows], heads.queries.shape[1]
    options = _as_the_preset(alpha, len(queries), heads.keys.shape[1], rows.device)
    return choose_lines(queries, heads.keys, rows + heads.history, new, scaling=heads.scaling, **options)


def _as_the_preset(alpha: float, query_heads: int, total: int, device: torch.device) -> dict[str, Any]:
    line = torch.arange(total, device=device).expand(query_heads, -1)
    return {"alpha": alpha, "cost": "tile", "forced_verticals": line < _SINKS, "forced_slashes": line < _LOCAL}


def check_selection(
    found: LineSelection, probabilities: Tensor, columns: Tensor, new: int, alpha: float, heads: Heads
) -> Verdict:
    """Verify that the stated coverage is present and sufficient, and that a small problem costs hardly more than the reference's.

    ``error`` is the excess of cost over the line-by-line greedy's, ``worst`` the coverage misstated or missing.
    """
    lines = LinePattern(found.verticals, found.slashes, new)
    inside = lines.coverage(probabilities.double(), columns)
    missing = float((alpha - inside).clamp(min=0).max())
    worst = max(missing, float((inside - found.coverage).abs().max()))
    forced = bool(found.verticals[:, :_SINKS].all() and found.slashes[:, :_LOCAL].all())
    excess = _excess_cost(heads, alpha)
    ok = worst <= 1e-3 and forced and excess <= _COST_SLACK
    why = "" if ok else f"coverage off by {worst:.1e}, cost {excess:+.1%} to the reference, forced lines kept: {forced}"
    return Verdict(worst, excess, None, ok, why)


def _excess_cost(heads: Heads, alpha: float) -> float:
    """Return the cost of the chosen lines over the reference's, minus 1, on the first tokens of one KV head."""
    own = of_kv_head(heads, 0)
    new = min(own.queries.shape[1], _CUT)
    total = min(own.keys.shape[1], max(_CUT, new))
    rows = sample_rows(new, _CUT_ROWS, Sampling.MIXED, generator(1)).to(own.keys.device)
    columns = rows + total - new
    # Queries of other positions serve as well: it only matters that both sides get the same probabilities.
    with backend.use("reference"):
        cut = line_scores(own.queries[:, rows], own.keys[:, :total], columns, scaling=own.scaling).probabilities
        exact = select(cut, columns, new, alpha).cost
    return float(select(cut, columns, new, alpha).cost.sum() / exact.sum()) - 1.0
