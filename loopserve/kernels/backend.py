"""Which implementation of an operation runs: decided here, and nowhere else.

``LOOPSERVE_KERNELS=auto|reference|cpu`` chooses for a whole process, ``with use(name)`` for a test.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

CHOICES = ("auto", "reference", "cpu")
_VARIABLE = "LOOPSERVE_KERNELS"
_forced: ContextVar[str | None] = ContextVar("loopserve_kernels", default=None)
_operations: dict[str, Operation] = {}


@dataclass(frozen=True)
class Operation:
    """One operation and its implementations, all with one signature. ``cpu`` is the packed pure-PyTorch path, if one pays."""

    name: str
    reference: Callable[..., Any]
    cpu: Callable[..., Any] | None = None

    def pick(self, tensor: Tensor) -> Callable[..., Any]:
        """The implementation for a tensor like this one."""
        return self.choose(tensor.dtype)[0]

    def choose(self, dtype: torch.dtype) -> tuple[Callable[..., Any], str, str]:
        """(implementation, its name, why)."""
        wanted = chosen()
        if self.cpu is None:
            return self.reference, "reference", "the only implementation"
        if wanted == "reference":
            return self.reference, "reference", f"{_VARIABLE}=reference"
        if dtype is torch.float64:
            return self.reference, "reference", "float64 is for checking"
        return self.cpu, "cpu", "packed PyTorch path" if wanted == "auto" else f"{_VARIABLE}={wanted}"


def operation(name: str, *, reference: Callable[..., Any], cpu: Callable[..., Any] | None = None) -> Operation:
    """Make an operation known; called once, where it is defined."""
    _operations[name] = Operation(name, reference, cpu)
    return _operations[name]


def chosen() -> str:
    """The choice in force. Raises ValueError for a name that is none."""
    name = _forced.get() or os.environ.get(_VARIABLE, "auto")
    if name not in CHOICES:
        raise ValueError(f"{_VARIABLE}={name!r} is unknown (known: {', '.join(CHOICES)})")
    return name


@contextmanager
def use(name: str) -> Iterator[None]:
    """Choose for the length of a block."""
    token = _forced.set(name)
    try:
        chosen()
        yield
    finally:
        _forced.reset(token)


def describe() -> list[dict[str, str]]:
    """A row per operation: which implementation serves float32, and why."""
    rows = []
    for name, each in sorted(_operations.items()):
        _, implementation, why = each.choose(torch.float32)
        rows.append({"operation": name, "implementation": implementation, "why": why})
    return rows
