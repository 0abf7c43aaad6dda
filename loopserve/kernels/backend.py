"""Which implementation of an operation runs: decided here, and nowhere else.

An operation has up to four implementations with one signature:

- ``reference``: readable PyTorch, the ground truth; serves everything, anywhere.
- ``torch``: fast plain PyTorch. Serves CPUs; where it says so, any device.
- ``cpu``: compiled C (``kernels.native``), where a C compiler is or was at hand.
- ``triton``: compiled for NVIDIA GPUs; on a CPU only interpreted (``TRITON_INTERPRET=1``), for tests.

``LOOPSERVE_KERNELS=auto|reference|torch|cpu|triton`` chooses for a whole process, ``with use(name)`` for a block. ``auto`` takes
the fastest that serves the call. A choice other than ``auto`` that has no implementation of an operation, or cannot serve a
call, gives way to the next slower one; if it cannot run on this machine at all, it is an error.
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
    """What serves a call, and why nothing faster does."""

    name: str
    why: str


@dataclass(frozen=True)
class Operation:
    """One operation and its implementations.

    modules: implementation by module path, imported when first needed. any_device: ``torch`` serves it on any device.
    limits: by implementation, what it cannot serve: given the operation's own arguments, the reason, or None.
    """

    name: str
    modules: dict[str, str]
    any_device: bool = False
    limits: dict[str, Callable[..., str | None]] = field(default_factory=dict)

    def __call__(self, first: Tensor, *args: Any, **options: Any) -> Any:
        """Run the implementation that serves this call; ``first`` says device and dtype."""
        for name in self._candidates(first.device.type, first.dtype):
            limit = self.limits.get(name)
            if limit is None or limit(first, *args, **options) is None:
                return self.implementation(name)(first, *args, **options)
        raise AssertionError("the reference serves everything")

    def implementation(self, name: str) -> Callable[..., Any]:
        """One implementation by name. KeyError if the operation has none of it."""
        return _resolve(self.modules[name], self.name)

    def choose(self, device: str, dtype: torch.dtype) -> Choice:
        """Who serves such tensors, shapes aside, and why."""
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
    *implementations: str,
    package: str | None = None,
    any_device: bool = False,
    limits: dict[str, Callable[..., str | None]] | None = None,
) -> Operation:
    """Make an operation known; called once, in the package that defines it.

    implementations: names beside ``reference``; each is the function ``name`` of the module of that name in the package, which is
    called like the operation unless it holds several.
    """
    home = f"{__name__.rpartition('.')[0]}.{package or name}"
    modules = {each: f"{home}.{each}" for each in ("reference", *implementations)}
    _operations[name] = Operation(name, modules, any_device, limits or {})
    return _operations[name]


@cache
def _resolve(module: str, name: str) -> Callable[..., Any]:
    found: Callable[..., Any] = getattr(import_module(module), name)
    return found


@cache
def unavailable(name: str, device: str) -> str | None:
    """Why the implementations of a name cannot run on a device at all; None if they can."""
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
    """The choice in force. Raises ValueError for a name that is none."""
    name = _forced.get() or os.environ.get(_VARIABLE) or "auto"
    if name not in CHOICES:
        raise ValueError(f"{_VARIABLE}={name!r} is unknown (known: {', '.join(CHOICES)})")
    return name


def _eligible() -> tuple[str, ...]:
    """Names to try, fastest first."""
    name = chosen()
    return FASTEST_FIRST if name == "auto" else FASTEST_FIRST[FASTEST_FIRST.index(name) :]


def _wanted_because() -> str:
    name = chosen()
    return "the fastest here" if name == "auto" else f"{_VARIABLE}={name}"


@contextmanager
def use(name: str) -> Iterator[None]:
    """Choose for the length of a block."""
    token = _forced.set(name)
    try:
        chosen()
        yield
    finally:
        _forced.reset(token)


def operations() -> dict[str, Operation]:
    """Every operation by name."""
    package = __name__.rpartition(".")[0]
    for module in iter_modules(import_module(package).__path__):  # an operation is known once its package was imported
        if module.ispkg:
            import_module(f"{package}.{module.name}")
    return dict(sorted(_operations.items()))


def describe(device: str = "cpu", dtype: torch.dtype = torch.float32) -> list[dict[str, str]]:
    """A row per operation, which implementation serves such tensors and why: keys operation, implementation, why."""
    rows = []
    for name, each in operations().items():
        choice = each.choose(device, dtype)
        rows.append({"operation": name, "implementation": choice.name, "why": choice.why})
    return rows
