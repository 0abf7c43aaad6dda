"""Make the checks that run under strict checks only, since they look at every number and every variable.

They find writes that no counter shows, state that a policy keeps outside the session, and references that outlast a pass.
"""

from __future__ import annotations

import random
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any

import torch
from pydantic import BaseModel
from torch import Tensor

from loopserve.core.engine.stats import LayerRecord, TurnStats
from loopserve.core.errors import Fault, PolicyError
from loopserve.core.guard.faults import Policy, chain
from loopserve.core.policy.interfaces import AttentionInputs
from loopserve.core.policy.layers import LayerSpec

_READ = ("queries", "keys", "values", "columns", "positions", "first_valid")
_NO_DATA = (ModuleType, type, FunctionType, BuiltinFunctionType, LayerSpec, LayerRecord, TurnStats, torch.nn.Module)
_DEPTH = 6
_MISSING = object()


class Inspection:
    """Hold the state before one call of a policy, to compare it with the state after the call."""

    def __init__(self, policy: Policy, inputs: AttentionInputs | None) -> None:
        self._inputs = inputs
        self._copies: dict[str, Tensor] = {}
        if inputs is not None:
            held = ((name, getattr(inputs, name)) for name in _READ)
            self._copies = {name: tensor.clone() for name, tensor in held if tensor is not None}
        self._shared = [each for name, owner in _owners(policy) for each in _watched(name, owner)]
        self._drawn = torch.get_rng_state(), random.getstate()
        self._switches = _switches()

    @property
    def wrote(self) -> bool:
        """Return whether any number of the inputs has changed. NaN equals NaN."""
        return any(not _same(getattr(self._inputs, name), copy) for name, copy in self._copies.items())

    def conclude(self) -> None:
        """Raise PolicyError if the policy kept something outside the session's state. Restore what it changed.

        Switches of the process are only compared and not restored, since other threads may have set them and rely on them.
        """
        if _switches() != self._switches:
            raise PolicyError(
                "a switch of the whole process (default dtype, gradients or number of threads) was turned during its call",
                Fault.HIDDEN,
            )
        numbers, python = self._drawn
        if not torch.equal(torch.get_rng_state(), numbers) or random.getstate() != python:
            torch.set_rng_state(numbers)
            random.setstate(python)
            raise PolicyError("it drew from the random numbers that all share; it must have a generator", Fault.HIDDEN)
        stores = storages([self._inputs.keys, self._inputs.values]) if self._inputs is not None else frozenset()
        changed = [(name, value) for each in self._shared for name, value in each.put_back()]
        for name, value in changed:
            if holds(value, stores):
                raise PolicyError(f"it kept a reference to the session's store in {name}", Fault.KEPT)
        if changed:
            raise PolicyError(f"it changed {changed[0][0]}, which all sessions share; it was put back", Fault.HIDDEN)


def _switches() -> tuple[Any, ...]:
    return torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads()


class _Variables:
    """Hold the named values of an owner (attributes, variables of a module, a dict) as they were."""

    def __init__(self, name: str, owner: Any) -> None:
        self._name, self._owner = name, owner
        self._kept = dict(self._now())

    def _now(self) -> Mapping[Any, Any]:
        return self._owner if isinstance(self._owner, dict) else vars(self._owner)

    def put_back(self) -> Iterator[tuple[str, Any]]:
        """Restore each value that has changed, and return the changed values with their names."""
        now = dict(self._now())
        for key in now.keys() | self._kept.keys():
            before, after = self._kept.get(key, _MISSING), now.get(key, _MISSING)
            if before is after or self._may_change(key, after):
                continue
            self._set(key, before)
            yield f"{self._name}.{key}", after

    def _may_change(self, key: Any, value: Any) -> bool:
        """Return whether a change is allowed: imports, functions, Python's own entries, and values that a class declares as cached."""
        if isinstance(value, _NO_DATA) or (isinstance(key, str) and key.startswith("__")):
            return True
        return isinstance(key, str) and isinstance(getattr(type(self._owner), key, None), cached_property)

    def _set(self, key: Any, value: Any) -> None:
        if isinstance(self._owner, dict):
            if value is _MISSING:
                del self._owner[key]
            else:
                self._owner[key] = value
        elif value is _MISSING:
            delattr(self._owner, key)
        else:
            setattr(self._owner, key, value)


class _Contents:
    """Hold the former contents of a list, set, deque or state of a generator."""

    def __init__(
        self, name: str, read: Callable[[], Any], write: Callable[[Any], None], same: Callable[..., bool]
    ) -> None:
        self._name, self._read, self._write, self._same = name, read, write, same
        self._kept = read()

    def put_back(self) -> Iterator[tuple[str, Any]]:
        now = self._read()
        if not self._same(now, self._kept):
            self._write(self._kept)
            yield self._name, now


def _owners(policy: Policy) -> Iterator[tuple[str, Any]]:
    """Return the places where a policy, and the policies that it wraps, could keep state: object, classes, their modules."""
    for each in chain(policy):
        yield f"the object {type(each).__name__}", each
        for owner in type(each).__mro__:
            if not owner.__module__.startswith(("loopserve.core", "builtins", "abc", "typing")):
                yield owner.__name__, owner
                if owner.__module__ in sys.modules:
                    yield owner.__module__, sys.modules[owner.__module__]


def _watched(name: str, owner: Any) -> Iterator[_Variables | _Contents]:
    """Return the variables of an owner and everything in them that can change in place."""
    yield _Variables(name, owner)
    seen: set[int] = set()
    depth = 2 if isinstance(owner, ModuleType) else _DEPTH  # the variables of a module may refer to anything
    for key, value in list(vars(owner).items()):
        if not key.startswith("__"):
            yield from _inside(f"{name}.{key}", value, seen, depth)


def _inside(name: str, value: Any, seen: set[int], depth: int) -> Iterator[_Variables | _Contents]:
    if id(value) in seen or not depth or isinstance(value, (*_NO_DATA, BaseModel)):
        return
    seen.add(id(value))
    if isinstance(value, dict):
        yield _Variables(name, value)
        parts: Iterable[Any] = list(value.values())
    elif isinstance(value, list | deque | set):
        yield _Contents(name, lambda: type(value)(value), lambda kept: _refill(value, kept), _identical)
        parts = list(value)
    elif isinstance(value, Tensor):
        yield _Contents(name, value.detach().clone, lambda kept: _keep(value.data.copy_(kept)), _same)
        return
    elif isinstance(value, torch.Generator):
        yield _Contents(name, value.get_state, lambda kept: _keep(value.set_state(kept)), torch.equal)
        return
    elif isinstance(value, random.Random):
        yield _Contents(name, value.getstate, value.setstate, lambda one, other: bool(one == other))
        return
    elif isinstance(value, tuple):
        parts = value
    elif hasattr(value, "__dict__") and type(value).__module__.partition(".")[0] not in ("torch", "builtins", "typing"):
        yield _Variables(name, value)
        parts = list(vars(value).values())
    else:
        return
    for number, part in enumerate(parts):
        yield from _inside(f"{name}[{number}]", part, seen, depth - 1)


def _refill(container: Any, kept: Any) -> None:
    container.clear()
    (container.update if isinstance(container, set) else container.extend)(kept)


def _identical(one: Any, other: Any) -> bool:
    if isinstance(one, set):
        return bool(one == other)
    return len(one) == len(other) and all(a is b for a, b in zip(one, other, strict=True))


def _same(one: Tensor, other: Tensor) -> bool:
    """Return whether two values are equal bit by bit, so that NaN equals itself."""
    return one.shape == other.shape and torch.equal(
        one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8)
    )


def storages(tensors: Iterable[Tensor]) -> frozenset[int]:
    """Return the storages of tensors."""
    return frozenset(tensor.untyped_storage().data_ptr() for tensor in tensors)


def holds(value: Any, stores: frozenset[int], depth: int = _DEPTH) -> bool:
    """Return whether a value is or contains a tensor in one of these storages."""
    if isinstance(value, Tensor):
        return value.device.type != "meta" and value.untyped_storage().data_ptr() in stores
    if not stores or not depth or isinstance(value, _NO_DATA):
        return False
    if isinstance(value, Mapping):
        parts: Iterable[Any] = list(value.values())
    elif isinstance(value, list | tuple | set | deque):
        parts = list(value)
    else:
        parts = list(getattr(value, "__dict__", {}).values())
    return any(holds(part, stores, depth - 1) for part in parts)


def _keep(_: object) -> None:
    """Accept the return value of a setter and drop it."""
