"""Count the cases of a promise, and keep what failed."""

from __future__ import annotations

import math
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from loopserve import Engine
from loopserve.serve.settings import ServerSettings
from tests.serve.conftest import Running


@dataclass
class Cases:
    """Collect the outcome of many cases. ``figures`` are what the row of a run holds beside the counts."""

    failures: list[str] = field(default_factory=list)
    count: int = 0
    figures: dict[str, Any] = field(default_factory=dict)

    @contextmanager
    def case(self, name: str) -> Iterator[None]:
        """Count one case; an exception in the block is its failure."""
        self.count += 1
        try:
            yield
        except Exception:
            self.failures.append(f"{name}: {traceback.format_exc(limit=-3)}")

    @property
    def row(self) -> dict[str, Any]:
        return {"cases": self.count, "failed": len(self.failures), **self.figures}


@cache
def demo_engine() -> Engine:
    return Engine.from_pretrained("demo", on_policy_fault="dense", dtype="float32")


@contextmanager
def running(engine: Engine | None = None, stacks: dict[str, Any] | None = None, **settings: Any) -> Iterator[Running]:
    """Serve a model, the bundled one by default, in this process."""
    server = Running(engine or demo_engine(), ServerSettings("demo", **settings), stacks)
    server.start()
    try:
        yield server
    finally:
        server.stop()


def percentile(values: Sequence[float], share: float) -> float:
    """Return the smallest value that is not below this share of the values."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]
