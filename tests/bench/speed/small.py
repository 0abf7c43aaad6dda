"""A benchmark small enough for tests: suites as Python, rows by operation."""

from __future__ import annotations

from typing import Any

from loopserve.bench.rows import Row
from loopserve.bench.speed.suite import Suite

SHAPE: dict[str, Any] = {
    "layers": 2,
    "hidden": 64,
    "heads": 2,
    "kv_heads": 1,
    "intermediate": 96,
    "vocabulary": 128,
    "dtypes": ["float32"],
}


def suite(**parts: list[dict[str, Any]]) -> Suite:
    return Suite.model_validate({"version": 1, "name": "tests", "runs": 2, **parts})


def by_op(rows: list[Row]) -> dict[str, Row]:
    return {row["op"]: row for row in rows}
