"""Define benchmark cases of operations, and verify each against its reference.

The check is made on the timed tensors, and inside a running model on the newest rows of some calls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from loopserve.bench.heads import Heads
from loopserve.bench.rows import Row
from loopserve.core.engine.stats import TurnStats
from loopserve.core.policy.interfaces import AttentionInputs, Phase
from loopserve.core.policy.layers import LayerSpec, LayerType
from loopserve.core.policy.patterns import TILE, AttentionPattern, BlockPattern, LinePattern
from loopserve.kernels import backend
from loopserve.kernels.backend import Operation
from loopserve.kernels.block_sparse import block_sparse
from loopserve.kernels.decode_attention import DecodeRequest
from loopserve.kernels.dense_attention import dense_attention
from loopserve.kernels.line_scores import row_probabilities_reference
from loopserve.kernels.vertical_slash import line_mask, vertical_slash
from loopserve.policies.prefill.loopserve import LoopServePrefill

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Largest relative error of a sampled row, and of all of them together. Rounding of inputs is not counted, since the
# reference gets the same rounded tensors in float64.
TOLERANCES = {torch.float32: (2e-3, 2e-4), torch.float16: (2e-2, 5e-3), torch.bfloat16: (8e-2, 2e-2)}
_IMPLEMENTATION = Operation.implementation  # the backend's own method, before a recorder replaces it
_CALLS = 2  # calls per operation that are repeated
_ROWS = 16  # newest rows of a call that are compared
_BY_ROWS = frozenset({"dense_attention", "decode_attention", "vertical_slash", "line_scores"})
_WHOLE = frozenset({"token_scores"})


@dataclass(frozen=True)
class Candidate:
    """Hold one operation on one case's tensors.

    run: the timed call. check: verifies the result of ``run``. pattern: densities computed from the result. parts:
    operations whose implementations the row names. scale: factor from measured to reported time.
    """

    op: str
    dtype: torch.dtype
    run: Callable[[], Any]
    check: Callable[[Any], Verdict]
    parts: tuple[str, ...]
    pattern: Callable[[Any], Row | None] = lambda _: None
    scale: float = 1.0
    impl: str | None = None  # None = ask the backend
    lines: tuple[Heads, LinePattern] | None = None  # the attended pairs, so that a rival attends to the same ones
    fields: Row = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """Hold one set of tensors, its candidates, and the dense attention that all are compared with.

    dense: the block that baselines compute, float32, on the heads they are run on; ``dense_scale`` scales its time to
    all heads. own_dense: our dense attention on it, by dtype.
    """

    shape: Row
    data: str
    candidates: list[Candidate]
    dense: Heads
    dense_scale: float
    own_dense: dict[torch.dtype, Candidate]
    fields: Row


class Target(Protocol):
    """Define a kind of device: its clock, and torch's dense attention on it."""

    device: str

    def clock(self, run: Callable[[], object]) -> float:
        """Return seconds of one call."""

    def dense(self, heads: Heads, dtypes: tuple[torch.dtype, ...]) -> dict[str, Callable[[], object]]:
        """Return by name every way of torch to compute the block densely."""

    def rivals(self, case: Case) -> list[Candidate]:
        """Return other libraries' operations for the same patterns, timed beside ours."""


def described(pattern: AttentionPattern) -> Row:
    """Return densities and line counts of a pattern, means over heads, and the density of the densest head."""
    cells, tiles = pattern.cell_density(), pattern.tile_density()
    fields: Row = {
        "cell_density": float(cells.mean()),
        "tile_density": float(tiles.mean()),
        "tile_density_most": float(tiles.max()),
    }
    if isinstance(pattern, LinePattern):
        fields["verticals_per_head"] = float(pattern.verticals.sum(1).float().mean())
        fields["slashes_per_head"] = float(pattern.slashes.sum(1).float().mean())
        assert pattern.dense_heads is not None
        fields["dense_heads"] = int(pattern.dense_heads.sum())
    if isinstance(pattern, BlockPattern):
        fields["tile"] = pattern.tile
    return fields


def as_call(heads: Heads) -> AttentionInputs:
    """Return one layer's prefill call with these heads, as the engine passes it to a sparsifier."""
    query_heads, new, dim = heads.queries.shape
    kv_heads, total = heads.keys.shape[:2]
    device = heads.keys.device
    return AttentionInputs(
        queries=heads.queries,
        keys=heads.keys,
        values=heads.values,
        columns=torch.arange(total - new, total, device=device),
        positions=torch.arange(total, device=device),
        first_valid=None,
        layer=LayerSpec(0, LayerType.FULL, query_heads, kv_heads, dim),
        phase=Phase.PREFILL,
        turn=0,
        turn_start=total - new,
        output_index=0,
        final=True,
        scaling=heads.scaling,
        softcap=None,
        record=TurnStats(0),
    )


def lines_sparsifier(alpha: float) -> LoopServePrefill:
    """Return a sparsifier whose lines hold a share alpha of the mass of 64 rows in every head, without a lower length limit."""
    config = LoopServePrefill.Config(alpha=alpha, sample_rows=64, cost="tile", min_new_tokens=0, min_total_tokens=0)
    return LoopServePrefill(config)


_WINDOWS, _ROWS = 8, 4  # stretches of rows that are checked, and rows of each


@dataclass(frozen=True)
class Verdict:
    """Hold errors of an operation. worst: largest relative error of a row. error (``rel_err_pattern``): of all rows together.

    rel_err: against dense attention in float64, None where it is not defined.
    """

    worst: float
    error: float
    rel_err: float | None
    ok: bool
    why: str = ""


def verdict(
    found: Tensor, exact: Tensor, dense: Tensor | None, dtype: torch.dtype, truth: Tensor | None = None
) -> Verdict:
    """Compare ``[..., rows, D]`` with its reference; ``truth`` replaces ``found`` in the comparison with dense."""
    worst_allowed, error_allowed = TOLERANCES[dtype]
    found, exact = found.double(), exact.double()
    finite = bool(found.isfinite().all())
    scale = exact.norm(dim=-1).clamp(min=1e-3 * float(exact.norm(dim=-1).mean()) + 1e-30)
    worst = float(((found - exact).norm(dim=-1) / scale).max()) if finite else float("inf")
    error = relative(found, exact) if finite else float("inf")
    ok = worst <= worst_allowed and error <= error_allowed
    why = (
        "" if ok else f"worst row {worst:.1e} (allowed {worst_allowed:.0e}), all rows {error:.1e} ({error_allowed:.0e})"
    )
    return Verdict(worst, error, None if dense is None else relative(found, dense), ok, why)


def relative(found: Tensor, exact: Tensor) -> float:
    """Return the Frobenius norm of the difference over that of the exact result."""
    exact = exact.double()
    return float((found.double() - exact).norm() / exact.norm().clamp(min=1e-30))


def sampled_rows(new_tokens: int, tile: int = TILE) -> list[tuple[int, int]]:
    """Return stretches of rows to check: the first and last rows, and rows on both sides of tile edges between them."""
    if new_tokens <= _WINDOWS * _ROWS:
        return [(0, new_tokens)]
    edges = [round(step * (new_tokens - _ROWS) / (_WINDOWS - 1)) for step in range(_WINDOWS)]
    inner = [max(edge // tile * tile - _ROWS // 2, 0) for edge in edges[1:-1]]
    return [(start, start + _ROWS) for start in sorted({0, *inner, new_tokens - _ROWS})]


def rows_of(output: Tensor, stretches: list[tuple[int, int]]) -> Tensor:
    return torch.cat([output[:, start:stop] for start, stop in stretches], dim=1)


def by_reference(
    heads: Heads, stretches: list[tuple[int, int]], attend: Callable[[Tensor, Tensor, Tensor, int], Tensor]
) -> Tensor:
    """Return rows ``[Hq, rows, D]`` in float64 by the reference: ``attend(queries, keys, values, stop)`` on cut tensors."""
    double = heads.to(torch.float64)
    parts = []
    with backend.use("reference"):
        for start, stop in stretches:
            end = heads.history + stop
            parts.append(attend(double.queries[:, start:stop], double.keys[:, :end], double.values[:, :end], end))
    return torch.cat(parts, dim=1)


def exact_dense(heads: Heads, stretches: list[tuple[int, int]]) -> Tensor:
    """Return dense attention of the sampled rows, float64 ``[Hq, rows, D]``."""
    return by_reference(heads, stretches, lambda q, k, v, _: dense_attention(q, k, v, scaling=heads.scaling)[0])


def exact_lines(heads: Heads, pattern: LinePattern, stretches: list[tuple[int, int]]) -> Tensor:
    """Return attention of the sampled rows under a pattern of lines, float64 ``[Hq, rows, D]``."""
    return by_reference(
        heads,
        stretches,
        lambda q, k, v, end: vertical_slash(
            q, k, v, pattern.verticals[:, :end], pattern.slashes[:, :end], scaling=heads.scaling
        )[0],
    )


def exact_blocks(heads: Heads, pattern: BlockPattern, tiles: list[int]) -> tuple[Tensor, list[tuple[int, int]]]:
    """Return whole query tiles under a pattern of blocks, and their stretches of rows."""
    side, new = pattern.tile, pattern.new_tokens
    stretches = [(tile * side, min((tile + 1) * side, new)) for tile in tiles]

    def attend(queries: Tensor, keys: Tensor, values: Tensor, end: int) -> Tensor:
        row = (end - heads.history - 1) // side
        blocks = pattern.blocks[:, row : row + 1, : -(-end // side)]
        return block_sparse(queries, keys, values, blocks, tile=side, scaling=heads.scaling)[0]

    return by_reference(heads, stretches, attend), stretches


@dataclass
class Audit:
    """Hold the largest relative error of a row by operation, and the problems found."""

    errors: dict[str, float] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def note(self, op: str, error: float, why: str) -> None:
        self.errors[op] = max(error, self.errors.get(op, 0.0))
        if why:
            self.problems.append(f"{op}: {why}")


@contextmanager
def audited() -> Iterator[Audit]:
    """Verify every operation called inside the block. This is slow, so nothing is timed in it."""
    found, counts = Audit(), dict[str, int]()
    call = Operation.__call__

    def checked(self: Operation, first: Tensor, *args: Any, **options: Any) -> Any:
        result = call(self, first, *args, **options)
        counts[self.name] = counts.get(self.name, 0) + 1
        if counts[self.name] <= _CALLS:
            _judge(self, found, result, (first, *args), options)
        return result

    Operation.__call__ = checked  # type: ignore[method-assign]
    try:
        yield found
    finally:
        Operation.__call__ = call  # type: ignore[method-assign]


def _judge(operation: Operation, audit: Audit, result: Any, args: tuple[Any, ...], options: dict[str, Any]) -> None:
    name, dtype = operation.name, args[0].dtype
    if name == "select_lines":
        _judge_selection(audit, result, args[0], options)
        return
    if name == "choose_lines":
        _judge_choice(audit, result, args, options)
        return
    reference = _IMPLEMENTATION(operation, "reference")
    if name == "decode_attention_batch":
        _judge_batch(reference, audit, result, args[1], options)
    elif name == "gather_kv":
        pairs = list(zip(result, reference(*args, **options), strict=True))
        same = all(torch.equal(ours, theirs) for ours, theirs in pairs)
        error = max(relative(*pair) for pair in pairs)
        audit.note(name, error, "" if same else "copies differ from the pairs chosen")
    elif name in _BY_ROWS | _WHOLE:
        ours = result if isinstance(result, Tensor) else result[0]
        if name in _BY_ROWS:
            args, options, ours = _newest(name, args), _newest_columns(options), ours[:, -_ROWS:]
        exact = reference(*map(_double, args), **options)
        judged = verdict(ours, exact if isinstance(exact, Tensor) else exact[0], None, dtype)
        audit.note(name, judged.worst, judged.why)


def _judge_batch(
    reference: Any, audit: Audit, result: Any, requests: Sequence[DecodeRequest], options: dict[str, Any]
) -> None:
    """Compare each session's output of one kernel call with the reference in float64."""
    doubled = [DecodeRequest(*map(_double, each)) for each in requests]
    exact = reference(doubled[0].queries, doubled, **options)
    for (ours, _), (theirs, _), request in zip(result, exact, requests, strict=True):
        judged = verdict(ours, theirs, None, request.queries.dtype)
        audit.note("decode_attention_batch", judged.worst, judged.why)


def _newest(name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the arguments for the newest rows only: queries and their positions."""
    queries, keys, *rest = args
    if name == "line_scores":
        rest = [rest[0][-_ROWS:], *rest[1:]]
    return queries[:, -_ROWS:], keys, *rest


def _newest_columns(options: dict[str, Any]) -> dict[str, Any]:
    columns = options.get("columns")
    return options if columns is None or columns.dim() > 1 else options | {"columns": columns[-_ROWS:]}


def _double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _judge_choice(audit: Audit, result: Any, args: tuple[Any, ...], options: dict[str, Any]) -> None:
    """Compare the coverage that a choice of lines states with the mass of its lines in the first KV head's rows."""
    (queries, keys, columns, _), (chosen, covered, *_) = args, result
    group = queries.shape[0] // keys.shape[0]
    first_valid = options["first_valid"]
    rows = row_probabilities_reference(
        queries[:group].double(),
        keys[:1].double(),
        columns,
        scaling=options["scaling"],
        softcap=options["softcap"],
        first_valid=None if first_valid is None else first_valid[:1],
    )
    inside = (rows * line_mask(chosen[:group, 0], chosen[:group, 1], columns)).sum(-1)
    error = float((inside - covered[:group].double()).abs().max())
    audit.note("choose_lines", error, "" if error <= 5e-3 else f"coverage of a row is off by {error:.1e}")


def _judge_selection(audit: Audit, result: Any, probabilities: Tensor, options: dict[str, Any]) -> None:
    """Verify that the stated coverage reaches the target. The greedy selection is not repeated: it would take minutes."""
    covered, weights = result[1].double(), options["row_weights"].double()
    whole = (probabilities.double().sum(-1) * weights).sum(-1)
    missing = float((options["alpha"] - (covered * weights).sum(-1) / whole.clamp(min=1e-30)).clamp(min=0).max())
    audit.note("select_lines", missing, "" if missing <= 1e-3 else f"covers {missing:.1e} less than alpha")
