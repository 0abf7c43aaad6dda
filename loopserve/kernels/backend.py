"""Select the implementation of each operation.

An operation has up to four implementations with one signature:

- ``reference``: readable PyTorch that defines the result. It serves every dtype on every device.
- ``torch``: fast PyTorch for CPUs, and for any device where the operation declares it.
- ``cpu``: compiled C (``kernels.native``). It needs a C compiler or a library built before.
- ``triton``: kernels for NVIDIA GPUs. On a CPU they run only interpreted (``TRITON_INTERPRET=1``), for tests.

``LOOPSERVE_KERNELS=auto|reference|torch|cpu|triton`` sets the choice of a process, ``with use(name)`` that of a block.
``auto`` takes the fastest implementation that serves the call. Any other choice falls back to the next slower
implementation where an operation lacks it or the call exceeds its limits. A choice that cannot run on this machine
raises RuntimeError.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pkgutil import iter_modules
from typing import Any, NamedTuple

import torch
from torch import Tensor

FASTEST_FIRST = ("triton", "cpu", "torch", "reference")
CHOICES = ("auto", *reversed(FASTEST_FIRST))
_VARIABLE = "LOOPSERVE_KERNELS"
_DTYPES = {
    "triton": (torch.float32, torch.bfloat16, torch.float16),
    "cpu": (torch.float32, torch.bfloat16),
    "torch": (torch.float32, torch.bfloat16, torch.float16),
}
_forced: ContextVar[str | None] = ContextVar("loopserve_kernels", default=None)
_operations: dict[str, Operation] = {}


class Choice(NamedTuple):
    """Name the implementation that serves a call, and the reason why no faster one does."""

    name: str
    why: str


@dataclass(frozen=True)
class Operation:
    """Hold one operation and its implementations.

    modules: ``module`` or ``module:function`` of each implementation, imported at first use; the function is called like
    the operation unless given. any_device: ``torch`` serves every device.
    limits: for an implementation, a function that takes the arguments of the operation and returns why it cannot serve
    them, or None.
    """

    name: str
    modules: dict[str, str]
    any_device: bool = False
    limits: dict[str, Callable[..., str | None]] = field(default_factory=dict)

    def __call__(self, first: Tensor, *args: Any, **options: Any) -> Any:
        """Run the fastest implementation that serves the call; ``first`` determines device and dtype."""
        for name in self._candidates(first.device.type, first.dtype):
            limit = self.limits.get(name)
            if limit is None or limit(first, *args, **options) is None:
                return self.implementation(name)(first, *args, **options)
        raise AssertionError("the reference serves everything")

    def implementation(self, name: str) -> Callable[..., Any]:
        """Return an implementation by name. Raises KeyError if the operation has none of that name."""
        return _resolve(self.modules[name], self.name)

    def choose(self, device: str, dtype: torch.dtype) -> Choice:
        """Return the implementation for this device and dtype, whatever the shapes, and the reason."""
        reasons: list[str] = []
        for name in _eligible():
            reason = self._refusal(name, device, dtype)
            if reason is None:
                return Choice(name, "; ".join(reasons) or _wanted_because())
            reasons.append(f"no {name}: {reason}")
        raise AssertionError("the reference serves everything")

    def _candidates(self, device: str, dtype: torch.dtype) -> tuple[str, ...]:
        wanted = chosen()
        key = (self.name, wanted, device, dtype)
        if key not in _candidates_seen:
            problem = unavailable(wanted, device) if wanted in self.modules else None
            if problem is not None:
                raise RuntimeError(f"{_VARIABLE}={wanted}, but {self.name} cannot run that way: {problem}")
            _candidates_seen[key] = tuple(n for n in _eligible() if self._refusal(n, device, dtype) is None)
        return _candidates_seen[key]

    def _refusal(self, name: str, device: str, dtype: torch.dtype) -> str | None:
        if name == "reference":
            return None
        if name not in self.modules:
            return "not written for this operation"
        if name == "triton" and device == "cpu" and chosen() == "auto":
            return "interpreted kernels are for tests"
        if dtype not in _DTYPES[name]:
            return f"{str(dtype).removeprefix('torch.')} is served by the reference only"
        if name == "torch":
            return None if device == "cpu" or self.any_device else f"runs on CPUs, this is {device}"
        return unavailable(name, device)


_candidates_seen: dict[tuple[str, str, str, torch.dtype], tuple[str, ...]] = {}


def operation(
    name: str,
    *,
    reference: str | None = None,
    torch: str | None = None,
    cpu: str | None = None,
    triton: str | None = None,
    any_device: bool = False,
    limits: dict[str, Callable[..., str | None]] | None = None,
) -> Operation:
    """Register an operation; the module that defines it calls this once.

    reference, torch, cpu, triton: module of each implementation, below ``loopserve.kernels``; that of the reference is
    called like the operation unless given. ``cpu`` and ``triton`` are functions called like the operation, the others
    have the name of the implementation behind it: ``gather_kv_reference``, ``gather_kv_torch``.
    """
    root = __name__.rpartition(".")[0]
    modules = {"reference": f"{root}.{reference or name}:{name}_reference"}
    if torch:
        modules["torch"] = f"{root}.{torch}:{name}_torch"
    modules |= {each: f"{root}.{path}" for each, path in (("cpu", cpu), ("triton", triton)) if path}
    _operations[name] = Operation(name, modules, any_device, limits or {})
    return _operations[name]


@cache
def _resolve(module: str, name: str) -> Callable[..., Any]:
    path, _, own_name = module.partition(":")
    found: Callable[..., Any] = getattr(import_module(path), own_name or name)
    return found


@cache
def unavailable(name: str, device: str) -> str | None:
    """Return why no implementation of this name can run on the device, or None if one can."""
    if name in ("reference", "torch"):
        return None
    if name == "cpu":
        if device != "cpu":
            return f"runs on CPUs, this is {device}"
        from loopserve.kernels.native import library

        return library.unavailable()
    if find_spec("triton") is None:
        return "triton is not installed"
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "runs on a CPU only with TRITON_INTERPRET=1"
    return None if device in ("cuda", "cpu") else f"not written for {device}"


def chosen() -> str:
    """Return the choice in force. Raises ValueError for an unknown name."""
    name = _forced.get() or os.environ.get(_VARIABLE) or "auto"
    if name not in CHOICES:
        raise ValueError(f"{_VARIABLE}={name!r} is unknown (known: {', '.join(CHOICES)})")
    return name


def _eligible() -> tuple[str, ...]:
    """Return the names to try, fastest first."""
    name = chosen()
    return FASTEST_FIRST if name == "auto" else FASTEST_FIRST[FASTEST_FIRST.index(name) :]


def _wanted_because() -> str:
    name = chosen()
    return "the fastest here" if name == "auto" else f"{_VARIABLE}={name}"


@contextmanager
def use(name: str) -> Iterator[None]:
    """Set the choice for the length of a block. Raises ValueError for an unknown name."""
    token = _forced.set(name)
    try:
        chosen()
        yield
    finally:
        _forced.reset(token)


def operations() -> dict[str, Operation]:
    """Return every operation by name."""
    package = __name__.rpartition(".")[0]
    for module in iter_modules(import_module(package).__path__):  # importing a module registers its operations
        import_module(f"{package}.{module.name}")
    return dict(sorted(_operations.items()))


def describe(device: str = "cpu", dtype: torch.dtype = torch.float32) -> list[dict[str, str]]:
    """Return a row per operation with the implementation for this device and dtype: keys operation, implementation,
    why.
    """
    rows = []
    for name, each in operations().items():
        choice = each.choose(device, dtype)
        rows.append({"operation": name, "implementation": choice.name, "why": choice.why})
    return rows
