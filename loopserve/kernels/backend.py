"""Select the implementation of each operation, and check its arguments.

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
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from loopserve.kernels.paged import Rows

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


# Checks before an operation dispatches. Compiled kernels read memory by address, so every argument that could lead to a wrong
# read (shape, dtype, device, index range) is rejected here.


def check(
    op: str,
    queries: Tensor,
    keys: Rows,
    values: Rows | None = None,
    *,
    columns: Tensor | None = None,
    first_valid: Tensor | None = None,
) -> None:
    """Raise ValueError unless queries ``[Hq, Tq, D]``, keys ``[Hkv, Tk, D]`` and values ``[Hkv, Tk, Dv]`` fit together.

    Without ``columns`` the queries are the last Tq columns, so Tq must not exceed Tk.
    """
    rows, held = queries.shape, keys.shape
    if len(rows) != 3 or len(held) != 3 or 0 in rows or 0 in held:
        raise ValueError(f"{op}: {_both(queries, keys)} must be non-empty [Hq, Tq, D] and [Hkv, Tk, D]")
    if rows[2] != held[2] or rows[0] % held[0]:
        raise ValueError(f"{op}: {_both(queries, keys)} do not fit: D must agree and Hkv divide Hq")
    if values is not None and (len(values.shape) != 3 or values.shape[:2] != held[:2]):
        raise ValueError(f"{op}: values {list(values.shape)} do not fit keys {list(held)}")
    kind, device = queries.dtype, queries.device
    for name, other in (("keys", keys), ("values", values)):
        if other is not None and (other.dtype is not kind or other.device != device):
            raise ValueError(f"{op}: queries are {kind} on {device}, {name} {other.dtype} on {other.device}")
    if columns is not None:
        check_columns(op, columns, rows[1], held[1], device)
    elif rows[1] > held[1]:
        raise ValueError(f"{op}: {rows[1]} queries cannot be the last of {held[1]} keys")
    if first_valid is not None:
        check_first_valid(op, first_valid, keys)


def _both(queries: Tensor, keys: Rows) -> str:
    return f"queries {list(queries.shape)} and keys {list(keys.shape)}"


def check_columns(op: str, columns: Tensor, rows: int, total: int, device: torch.device) -> None:
    """Raise ValueError unless ``columns`` are int64 ``[rows]`` in ``[0, total)`` on this device."""
    if columns.shape != (rows,) or columns.dtype != torch.long:
        raise ValueError(f"{op}: {rows} rows need int64 columns [{rows}], got {columns.dtype} {list(columns.shape)}")
    check_device(op, "columns", columns, device)
    # Reading a value synchronises with an accelerator. So on a GPU the caller must ensure the range.
    if columns.device.type == "cpu":
        check_range(f"{op}: columns", columns, total)


def check_first_valid(op: str, first_valid: Tensor, of: Rows) -> None:
    """Raise ValueError unless ``first_valid`` is int64 ``[H]`` beside ``of`` ``[H, n, ...]``, from 0 to n."""
    if first_valid.shape != of.shape[:1] or first_valid.dtype != torch.long:
        raise ValueError(
            f"{op}: first_valid {first_valid.dtype} {list(first_valid.shape)} must be int64 [{of.shape[0]}]"
        )
    check_device(op, "first_valid", first_valid, of.device)
    if first_valid.device.type == "cpu":
        check_range(f"{op}: first_valid", first_valid, of.shape[1] + 1)


def check_device(op: str, name: str, tensor: Tensor, device: torch.device) -> None:
    """Raise ValueError unless a tensor is on the device of the others."""
    if tensor.device != device:
        raise ValueError(f"{op}: {name} are on {tensor.device}, the rest is on {device}")


def check_range(what: str, indices: Tensor, total: int, lowest: int = 0) -> None:
    """Raise ValueError unless all indices lie in ``[lowest, total)``."""
    if indices.numel() == 0:
        return
    low, high = map(int, indices.aminmax())
    if low < lowest or high >= total:
        raise ValueError(f"{what} must lie in [{lowest}, {total}), got {low} to {high}")


def check_lines(op: str, verticals: Tensor, slashes: Tensor, heads: int, total: int, device: torch.device) -> None:
    """Raise ValueError unless both are bool ``[heads, total]`` on this device."""
    for name, lines in (("verticals", verticals), ("slashes", slashes)):
        check_flags(op, name, lines, (heads, total), device)


def check_flags(op: str, name: str, flags: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    """Raise ValueError unless ``flags`` are bool of this shape on this device."""
    if flags.shape != shape or flags.dtype != torch.bool:
        raise ValueError(f"{op}: {name} must be bool {list(shape)}, got {flags.dtype} {list(flags.shape)}")
    check_device(op, name, flags, device)
