"""Define the operations of a turn's new tokens: scoring, selection, attention, and all three as the policy runs them."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from loopserve.bench.heads import Heads, PlantedSparsifier, model_heads, random_heads, structured_heads
from loopserve.bench.speed.parity import (
    DTYPES,
    Candidate,
    Case,
    Verdict,
    as_call,
    described,
    exact_blocks,
    exact_dense,
    exact_lines,
    lines_sparsifier,
    rows_of,
    sampled_rows,
    verdict,
)
from loopserve.bench.speed.suite import KernelPrefill
from loopserve.core.policy.interfaces import PrefillSparsifier
from loopserve.core.policy.patterns import TILE, AttentionPattern, BlockPattern, DensePattern, LinePattern
from loopserve.kernels import backend
from loopserve.kernels.block_sparse import block_sparse
from loopserve.kernels.choose_lines import choose_lines
from loopserve.kernels.dense_attention import dense_attention
from loopserve.kernels.line_scores import LineScores, line_scores
from loopserve.kernels.select_lines import LineSelection, select_lines
from loopserve.kernels.vertical_slash import vertical_slash
from loopserve.policies.draws import Sampling, generator, sample_rows

_SINKS, _LOCAL = 4, 64
_CUT = 2048  # tokens on which the greedy is compared with the line-by-line one, which is slow
_CUT_ROWS = 64  # number of their rows that select
_COST_SLACK = 0.05
SPARSE_PARTS = ("choose_lines", "vertical_slash")
_BLOCK_SHARE = 0.12  # key tiles that the block pattern keeps of those before a query tile


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


def prefill_case(part: KernelPrefill, device: str) -> Case:
    """Return the candidates of one case; every axis of ``part`` holds a single number."""
    heads = _heads(part, device)
    (query_heads, new, dim), (kv_heads, total) = heads.queries.shape, heads.keys.shape[:2]
    sparsifier: PrefillSparsifier = lines_sparsifier(part.alpha)
    if part.data == "planted":
        assert isinstance(part.density, float)
        sparsifier = PlantedSparsifier(sparsifier, part.density, part.density_of)
        pattern: AttentionPattern = sparsifier.planted(as_call(heads))
    else:
        pattern = sparsifier.sparsify(as_call(heads))
    dense_heads = min(part.dense_heads or kv_heads, kv_heads)
    candidates, own = [], {}
    for dtype in (DTYPES[name] for name in part.dtypes):
        block = _Block(heads.to(dtype), pattern, sparsifier, part.alpha)
        own[dtype] = block.dense(dense_heads, "auto")
        chosen = own[dtype] if backend.chosen() == "auto" else block.dense(dense_heads, backend.chosen())
        candidates += [chosen if op == "dense_attention" else getattr(block, op)() for op in part.ops]
    fields = {"alpha": part.alpha if part.data != "planted" else None}
    if dense_heads < kv_heads:
        fields["scaled_from_heads"] = dense_heads * (query_heads // kv_heads)
    return Case(
        shape={"q_heads": query_heads, "kv_heads": kv_heads, "m": new, "n": total, "head_dim": dim},
        data=heads.data + (f", planted {part.density:.0%} {part.density_of}" if part.data == "planted" else ""),
        candidates=candidates,
        dense=heads.first(dense_heads),
        dense_scale=kv_heads / dense_heads,
        own_dense=own,
        fields=fields,
    )


def _heads(part: KernelPrefill, device: str) -> Heads:
    assert isinstance(part.tokens, int) and isinstance(part.head_dim, int)
    assert part.new_tokens is None or isinstance(part.new_tokens, int)
    new = part.new_tokens or part.tokens
    if part.data == "model":
        return model_heads(part.query_heads, new, part.tokens, device=device)
    make = structured_heads if part.data == "structured" else random_heads
    return make(part.query_heads, part.kv_heads, new, part.tokens, part.head_dim, device=device)


class _Block:
    """Hold one case in one dtype. Each operation is a method of its own name; exact results are computed once."""

    def __init__(self, heads: Heads, pattern: AttentionPattern, sparsifier: PrefillSparsifier, alpha: float) -> None:
        self.heads, self.pattern, self.sparsifier, self.alpha = heads, pattern, sparsifier, alpha
        self.dtype = heads.queries.dtype
        self.new, self.total = heads.queries.shape[1], heads.keys.shape[1]
        self.stretches = sampled_rows(self.new)
        sampled = lines_sparsifier(alpha).config.sample_rows
        self.rows = sample_rows(self.new, sampled, Sampling.MIXED, generator(0)).to(heads.keys.device)
        self.columns = self.rows + heads.history
        self.exact_dense = cache(partial(exact_dense, heads, self.stretches))
        self.probabilities = cache(lambda: self._scores().probabilities)

    def _scores(self) -> LineScores:
        return line_scores(self.heads.queries[:, self.rows], self.heads.keys, self.columns, scaling=self.heads.scaling)

    def dense(self, kv_heads: int, choice: str) -> Candidate:
        """Run our dense attention on the first KV heads, under a choice of implementations (``auto``: the fastest)."""
        part = self.heads.first(kv_heads)

        def run() -> Tensor:
            with backend.use(choice):
                return dense_attention(*part.tensors, scaling=part.scaling)[0]

        def check(found: Tensor) -> Verdict:
            exact = self.exact_dense()[: part.queries.shape[0]]
            return verdict(rows_of(found, self.stretches), exact, exact, self.dtype)

        return Candidate(
            "dense_attention",
            self.dtype,
            run,
            check,
            ("dense_attention",),
            scale=self.heads.keys.shape[0] / kv_heads,
        )

    def line_scores(self) -> Candidate:
        def check(found: LineScores) -> Verdict:
            judged = []
            for kv in sorted({0, self.heads.keys.shape[0] - 1}):  # all heads at once would take gigabytes in float64
                own = of_kv_head(self.heads, kv)
                with backend.use("reference"):
                    exact = line_scores(
                        own.queries[:, self.rows].double(), own.keys.double(), self.columns, scaling=own.scaling
                    )
                group = slice(kv * own.queries.shape[0], (kv + 1) * own.queries.shape[0])
                for ours, theirs in zip(found, exact, strict=True):
                    judged.append(verdict(ours[group], theirs, None, self.dtype))
            return max(judged, key=lambda each: (not each.ok, each.worst))

        return Candidate("line_scores", self.dtype, self._scores, check, ("line_scores",))

    def select_lines(self) -> Candidate:
        return Candidate(
            "select_lines",
            self.dtype,
            lambda: select(self.probabilities(), self.columns, self.new, self.alpha),
            lambda found: check_selection(found, self.probabilities(), self.columns, self.new, self.alpha, self.heads),
            ("select_lines",),
            lambda found: described(LinePattern(found.verticals, found.slashes, self.new)),
        )

    def choose_lines(self) -> Candidate:
        """Run scoring and selection in one call, as a sparsifier requests them."""
        return Candidate(
            "choose_lines",
            self.dtype,
            lambda: choose(self.heads, self.rows, self.alpha),
            lambda found: check_selection(found, self.probabilities(), self.columns, self.new, self.alpha, self.heads),
            ("choose_lines",),
            lambda found: described(LinePattern(found.verticals, found.slashes, self.new)),
        )

    def vertical_slash(self) -> Candidate:
        lines = _as_lines(self.pattern, self.columns.device)
        return Candidate(
            "vertical_slash",
            self.dtype,
            lambda: vertical_slash(*self.heads.tensors, lines.verticals, lines.slashes, scaling=self.heads.scaling)[0],
            lambda found: self._judge(found, lines),
            ("vertical_slash",),
            lambda _: described(lines),
            lines=(self.heads, lines),
        )

    def block_sparse(self) -> Candidate:
        blocks = pooled_blocks(self.heads)

        def check(found: Tensor) -> Verdict:
            last = blocks.blocks.shape[1] - 1
            exact, stretches = exact_blocks(self.heads, blocks, sorted({0, last // 2, last}))
            dense = exact_dense(self.heads, stretches)
            return verdict(rows_of(found, stretches), exact, dense, self.dtype)

        return Candidate(
            "block_sparse",
            self.dtype,
            lambda: block_sparse(*self.heads.tensors, blocks.blocks, tile=blocks.tile, scaling=self.heads.scaling)[0],
            check,
            ("block_sparse",),
            lambda _: described(blocks),
        )

    def sparse_prefill(self) -> Candidate:
        """Run scoring, selection and attention, as the sparsifier of the preset does in every layer."""

        def run() -> tuple[Tensor, AttentionPattern]:
            pattern = self.sparsifier.sparsify(as_call(self.heads))
            return pattern.attend(*self.heads.tensors, scaling=self.heads.scaling)[0], pattern

        return Candidate(
            "sparse_prefill",
            self.dtype,
            run,
            lambda found: self._judge(found[0], _as_lines(found[1], self.columns.device)),
            SPARSE_PARTS,
            lambda found: described(found[1]),
        )

    def _judge(self, found: Tensor, lines: LinePattern) -> Verdict:
        exact = exact_lines(self.heads, lines, self.stretches)
        return verdict(rows_of(found, self.stretches), exact, self.exact_dense(), self.dtype)


def _as_lines(pattern: AttentionPattern, device: torch.device) -> LinePattern:
    """Return a pattern as lines; a dense one is every slash."""
    if isinstance(pattern, LinePattern):
        return pattern
    assert isinstance(pattern, DensePattern)
    every = torch.ones(pattern.heads, pattern.total_tokens, dtype=torch.bool, device=device)
    return LinePattern(torch.zeros_like(every), every, pattern.new_tokens)


def pooled_blocks(heads: Heads) -> BlockPattern:
    """Return key tiles by the score of pooled queries and keys: a fixed share of those before each query tile.

    Sinks and the own tile are always included.
    """
    new, total = heads.queries.shape[1], heads.keys.shape[1]
    group = heads.queries.shape[0] // heads.keys.shape[0]

    def pooled(each: Tensor) -> Tensor:
        return torch.stack([part.float().mean(1) for part in each.split(TILE, dim=1)], dim=1)

    scores = pooled(heads.queries) @ pooled(heads.keys).repeat_interleave(group, 0).transpose(1, 2)
    last = (torch.arange(0, new, TILE, device=scores.device) + min(TILE, new) - 1).clamp(max=new - 1) + total - new
    seen = torch.arange(scores.shape[2], device=scores.device) * TILE <= last[:, None]
    kept = (seen.sum(1).float() * _BLOCK_SHARE).ceil().long().clamp(min=1)
    order = scores.masked_fill(~seen, float("-inf")).argsort(dim=-1, descending=True)
    rank = torch.empty_like(order).scatter_(
        2, order, torch.arange(order.shape[2], device=order.device).expand_as(order)
    )
    blocks = (rank < kept[:, None]) & seen
    blocks[:, :, 0] = True
    return BlockPattern(blocks, new, total)
