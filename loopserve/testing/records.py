"""Record all figures that a policy reports."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor


class FakeRecord:
    """Keep each value that a policy reports, for a test to read (``interfaces.Record``)."""

    def __init__(self) -> None:
        self.counters: dict[str, float] = defaultdict(float)
        self.values: dict[str, list[Tensor]] = defaultdict(list)
        self.bytes: dict[str, float] = defaultdict(float)

    def count(self, name: str, amount: float = 1.0) -> None:
        self.counters[name] += amount

    def mean(self, name: str, value: float | Tensor) -> None:
        self.values[name].append(_tensor(value).detach().clone())

    def read(self, kind: str, amount: float) -> None:
        self.bytes[kind] += amount


def _tensor(value: float | Tensor) -> Tensor:
    return value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float32, device="cpu")
