"""Which implementation of an operation runs: decided here, and nowhere else.

``LOOPSERVE_KERNELS=auto|reference|cpu`` chooses for a whole process, ``with use(name)`` for a test.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

import torch
from torch import Tensor

CHOICES = ("auto", "reference", "cpu")
_VARIABLE = "LOOPSERVE_KERNELS"
_PACKED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_forced: ContextVar[str | None] = ContextVar("loopserve_kernels", default=None)
_operations: dict[str, Operation] = {}


@dataclass(frozen=True)
class Operation:
    """One operation and its implementations, all with one signature.

    cpu: the fast path in plain PyTorch, if one pays. any_device: that path is as good on other devices as on a CPU.
    """

    name: str
    reference: Callable[..., Any]
    cpu: Callable[..., Any] | None = None
    any_device: bool = False

    def pick(self, tensor: Tensor) -> Callable[..., Any]:
        """The implementation for a tensor like this one."""
        return self.choose(tensor.device.type, tensor.dtype)[0]

    def choose(self, device: str, dtype: torch.dtype) -> tuple[Callable[..., Any], str, str]:
        """(implementation, its name, why)."""
        wanted = chosen()
        if self.cpu is None:
            return self.reference, "reference", "the only implementation"
        if wanted == "reference":
            return self.reference, "reference", f"{_VARIABLE}=reference"
        if dtype not in _PACKED_DTYPES:
            return self.reference, "reference", f"{str(dtype).removeprefix('torch.')} is served by the reference only"
        if device != "cpu" and not self.any_device:
            return self.reference, "reference", f"no implementation for {device} yet"
        return self.cpu, "cpu", "fast PyTorch path" if wanted == "auto" else f"{_VARIABLE}={wanted}"


def operation(
    name: str, *, reference: Callable[..., Any], cpu: Callable[..., Any] | None = None, any_device: bool = False
) -> Operation:
    """Make an operation known; called once, where it is defined."""
    _operations[name] = Operation(name, reference, cpu, any_device)
    return _operations[name]


def chosen() -> str:
    """The choice in force. Raises ValueError for a name that is none."""
    name = _forced.get() or os.environ.get(_VARIABLE) or "auto"
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


def describe(device: str = "cpu", dtype: torch.dtype = torch.float32) -> list[dict[str, str]]:
    """A row per operation, which implementation serves such tensors and why: keys operation, implementation, why."""
    package = __name__.rpartition(".")[0]
    for module in iter_modules(import_module(package).__path__):  # an operation is known once its package was imported
        if module.ispkg:
            import_module(f"{package}.{module.name}")
    rows = []
    for name, each in sorted(_operations.items()):
        _, implementation, why = each.choose(device, dtype)
        rows.append({"operation": name, "implementation": implementation, "why": why})
    return rows
