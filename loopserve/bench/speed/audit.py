"""Are the operations right inside a running model? The first calls of each are repeated by the reference in float64, on
the newest rows where all would take too long.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from loopserve.bench.speed.parity import relative, verdict
from loopserve.kernels.backend import Operation
from loopserve.kernels.decode_attention import DecodeRequest
from loopserve.kernels.line_scores.reference import row_probabilities
from loopserve.kernels.vertical_slash.reference import line_mask

_IMPLEMENTATION = Operation.implementation  # as it is when nobody watches which one is asked for
_CALLS = 2  # calls per operation that are repeated
_ROWS = 16  # newest rows of a call that are compared
_BY_ROWS = frozenset({"dense_attention", "decode_attention", "vertical_slash", "line_scores"})
_WHOLE = frozenset({"token_scores"})


@dataclass
class Audit:
    """Largest relative error of a row by operation, and what is wrong."""

    errors: dict[str, float] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def note(self, op: str, error: float, why: str) -> None:
        self.errors[op] = max(error, self.errors.get(op, 0.0))
        if why:
            self.problems.append(f"{op}: {why}")


@contextmanager
def audited() -> Iterator[Audit]:
    """Audit every operation called inside the block; slow, so nothing is timed in it."""
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
    """The arguments for the newest rows only: queries, and where they stand."""
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
    """The mass that it says it covers in the first KV head's rows must be what its lines hold of them, by the reference."""
    (queries, keys, columns, _), (chosen, covered, *_) = args, result
    group = queries.shape[0] // keys.shape[0]
    first_valid = options["first_valid"]
    rows = row_probabilities(
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
    """The weighted mass that it says it covers must be what was asked for; the greedy itself would take minutes."""
    covered, weights = result[1].double(), options["row_weights"].double()
    whole = (probabilities.double().sum(-1) * weights).sum(-1)
    missing = float((options["alpha"] - (covered * weights).sum(-1) / whole.clamp(min=1e-30)).clamp(min=0).max())
    audit.note("select_lines", missing, "" if missing <= 1e-3 else f"covers {missing:.1e} less than alpha")
