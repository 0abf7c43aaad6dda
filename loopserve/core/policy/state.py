"""Write policy states as JSON and tensors, and read them back. Uses neither pickle nor eval.

A state is made of tensors, numbers, strings, None, bools, bytes, devices, dtypes, enums, tuples, lists, dictionaries, deques,
dataclasses, and objects with ``pack`` and ``unpack``. Classes are looked up by name among the types that the caller allows.

Every value that JSON does not have is an object with one key, its kind: ``{"tensor": 3}``, ``{"tuple": [...]}``,
``{"object": ["QuestState", {...}]}``. An object that a state holds twice is written once and is one object again afterwards.
"""

from __future__ import annotations

import base64
import dataclasses
import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import Enum
from functools import cached_property
from typing import Any, Protocol, Self, get_args, get_type_hints, runtime_checkable

import torch
from torch import Tensor

from loopserve.core.errors import PolicyError

PackedState = tuple[Any, list[Tensor]]
"""A JSON-able tree, and the tensors that it names by their index."""

_PLAIN = (type(None), bool, int, str)
_DEPTH = 100  # nesting limit: deeper than any intended state, below Python's own limit


@runtime_checkable
class Packable(Protocol):
    """Define a part of a state that has its own written form, e.g. because it can be computed again from the store."""

    def pack(self) -> Any:
        """Return values from which an equal object can be made."""

    @classmethod
    def unpack(cls, packed: Any) -> Self:
        """Return the object made from these values. Raises ValueError or TypeError for values that do not fit."""


def types_within(*roots: object) -> dict[str, type]:
    """Return the classes that annotations lead to, by qualified name, from classes or annotations.

    Follows the fields of dataclasses. Raises PolicyError for two classes of one name, and for annotations that cannot be resolved.
    """
    types: dict[str, type] = {}
    waiting = list(roots)
    while waiting:
        each = waiting.pop()
        waiting.extend(get_args(each))
        if not isinstance(each, type) or not _has_a_form(each) or getattr(each, "transient", False):
            continue
        known = types.get(each.__qualname__)
        if known is None:
            types[each.__qualname__] = each
            waiting.extend(_hints(each).values() if dataclasses.is_dataclass(each) else ())
        elif known is not each:
            raise PolicyError(
                f"its state has two types named {each.__qualname__!r}, of {known.__module__} and {each.__module__}: rename one"
            )
    return types


def _has_a_form(kind: type) -> bool:
    return dataclasses.is_dataclass(kind) or issubclass(kind, Enum) or _is_packable(kind)


def _is_packable(kind: type) -> bool:
    return callable(getattr(kind, "pack", None)) and callable(getattr(kind, "unpack", None))


def _hints(kind: type) -> Mapping[str, Any]:
    try:
        hints = get_type_hints(kind)
    except Exception as error:  # names that exist for type checkers only, or forward references in a function
        raise PolicyError(
            f"the annotations of its state type {kind.__qualname__!r} cannot be resolved ({error}): import at module level what they "
            "name, or override pack_state and unpack_state"
        ) from error
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def pack_state(state: Any, types: Mapping[str, type]) -> PackedState:
    """Return ``state`` as a tree that ``json`` can write and a list of contiguous tensors. All of them are copies.

    types: the classes that may occur, by qualified name, see ``types_within``. Raises PolicyError that names the first value which
    cannot be written.
    """
    writer = _Writer(types)
    return writer.tree(state, "state"), writer.tensors


def unpack_state(
    tree: Any, tensors: Sequence[Tensor], types: Mapping[str, type], device: torch.device | None = None
) -> Any:
    """Return the state that ``pack_state`` wrote. The state takes over the tensors of the list.

    device: where the state's tensors and devices go; None leaves them where they are. Raises PolicyError for a tree that is damaged
    or names a class that is not among ``types``.
    """
    return _Reader(tensors, types, device).value(tree, "state")


class _Writer:
    def __init__(self, types: Mapping[str, type]) -> None:
        self.tensors: list[Tensor] = []
        self._names = {kind: name for name, kind in types.items()}
        self._places: dict[int, int] = {}  # by id of a tensor, its index in the list
        self._numbers: dict[int, int] = {}  # by id of a mutable object, its number in the order of first occurrence
        self._open: set[int] = set()
        self._kept: list[Any] = []  # keeps objects that were written by id alive, so that their ids are not reused

    def tree(self, value: Any, at: str) -> Any:
        if type(value) in _PLAIN:
            return value
        if type(value) is float:
            return value if math.isfinite(value) else {"float": repr(value)}
        if type(value) is bytes:
            return {"bytes": base64.b64encode(value).decode("ascii")}
        if isinstance(value, torch.device):
            return {"device": str(value)}
        if isinstance(value, torch.dtype):
            return {"dtype": str(value).removeprefix("torch.")}
        if type(value) is Tensor:
            return {"tensor": self._tensor(value, at)}
        if type(value) is tuple:
            return {"tuple": self._all(value, at)}
        if isinstance(value, Enum) and value.name in type(value).__members__:
            return {"enum": [self._name(value, at), value.name]}
        return self._object(value, at)

    def _all(self, values: Iterable[Any], at: str) -> list[Any]:
        if at.count("[") + at.count(".") > _DEPTH:
            raise PolicyError(f"{at[:60]}... is nested deeper than {_DEPTH} levels")
        return [self.tree(each, f"{at}[{index}]") for index, each in enumerate(values)]

    def _tensor(self, value: Tensor, at: str) -> int:
        if value.layout is not torch.strided or value.is_quantized or value.device.type == "meta":
            raise PolicyError(
                f"{at} is a tensor ({value.layout}, {value.dtype}, {value.device}) that cannot be written; keep a dense one"
            )
        if id(value) not in self._places:
            self._places[id(value)] = len(self.tensors)
            self._kept.append(value)
            self.tensors.append(value.detach().clone(memory_format=torch.contiguous_format))
        return self._places[id(value)]

    def _object(self, value: Any, at: str) -> Any:
        if id(value) in self._open:
            raise PolicyError(f"{at} holds itself ({type(value).__name__}), which cannot be written")
        if id(value) in self._numbers:
            return {"same": self._numbers[id(value)]}
        self._numbers[id(value)] = len(self._numbers)
        self._kept.append(value)
        self._open.add(id(value))
        written = self._open_object(value, at)
        self._open.discard(id(value))
        return written

    def _open_object(self, value: Any, at: str) -> Any:
        if type(value) is list:
            return {"list": self._all(value, at)}
        if type(value) is deque:
            return {"deque": [value.maxlen, self._all(value, at)]}
        if type(value) is dict:
            return {
                "dict": [
                    [self.tree(key, f"{at} key"), self.tree(each, f"{at}[{key!r}]")] for key, each in value.items()
                ]
            }
        name = self._name(value, at)
        if _is_packable(type(value)):
            return {"object": [name, self.tree(value.pack(), at)]}
        fields = [field.name for field in dataclasses.fields(value)]
        extra = [
            each for each in getattr(value, "__dict__", {}) if each not in fields and not _is_cache(type(value), each)
        ]
        if extra:
            raise PolicyError(f"{at}.{extra[0]} is no field of {name}, so it would be lost: declare it")
        missing = [each for each in fields if not hasattr(value, each)]
        if missing:
            raise PolicyError(f"{at}.{missing[0]} is a field of {name} without a value")
        return {"object": [name, {each: self.tree(getattr(value, each), f"{at}.{each}") for each in fields}]}

    def _name(self, value: Any, at: str) -> str:
        kind = type(value)
        if getattr(kind, "transient", False):
            raise PolicyError(f"{at} is a {kind.__name__}, which holds parts of the store and ends with its pass")
        if kind not in self._names:
            advice = (
                "name its type in the state's annotations or in the policy's state_types"
                if _has_a_form(kind)
                else "a state is made of tensors, numbers, strings, None, bools, bytes, enums, tuples, lists, dictionaries, deques "
                "and dataclasses; else the policy overrides pack_state and unpack_state"
            )
            raise PolicyError(f"{at} is a {kind.__module__}.{kind.__qualname__}, which cannot be written: {advice}")
        return self._names[kind]


def _is_cache(kind: type, name: str) -> bool:
    return isinstance(getattr(kind, name, None), cached_property)


class _Reader:
    def __init__(self, tensors: Sequence[Tensor], types: Mapping[str, type], device: torch.device | None) -> None:
        self._tensors = [each if device is None else each.to(device) for each in tensors]
        self._types, self._device = types, device
        self._objects: list[Any] = []
        self._kinds: dict[str, Callable[[Any, str], Any]] = {
            "float": lambda body, at: float(body),
            "bytes": lambda body, at: base64.b64decode(body, validate=True),
            "device": lambda body, at: self._device or torch.device(body),
            "dtype": lambda body, at: _dtype(body),
            "tensor": lambda body, at: self._tensors[_index(body, len(self._tensors))],
            "tuple": lambda body, at: tuple(self._all(body, at)),
            "enum": lambda body, at: self._type(body[0], at)[body[1]],  # type: ignore[index]
            "same": lambda body, at: self._objects[_index(body, len(self._objects))],
            "list": self._list,
            "deque": self._deque,
            "dict": self._dict,
            "object": self._object,
        }

    def value(self, tree: Any, at: str) -> Any:
        if type(tree) in _PLAIN or type(tree) is float:
            return tree
        try:
            if not isinstance(tree, dict):
                raise TypeError(f"a {type(tree).__name__} is not expected")
            ((kind, body),) = tree.items()
            return self._kinds[kind](body, at)
        except PolicyError:
            raise
        except (TypeError, ValueError, KeyError, IndexError, AttributeError, RuntimeError, RecursionError) as error:
            raise PolicyError(
                f"{at[:200]}: what was written of a state is damaged ({type(error).__name__}: {error})"
            ) from error

    def _all(self, body: Any, at: str) -> list[Any]:
        if not isinstance(body, list):
            raise TypeError("a list is expected")
        return [self.value(each, f"{at}[{index}]") for index, each in enumerate(body)]

    def _begin(self, made: Any) -> Any:
        self._objects.append(made)  # numbered at its first occurrence, as the writer does
        return made

    def _list(self, body: Any, at: str) -> list[Any]:
        made: list[Any] = self._begin([])
        made.extend(self._all(body, at))
        return made

    def _deque(self, body: Any, at: str) -> deque[Any]:
        most, parts = body
        made: deque[Any] = self._begin(deque(maxlen=most))
        made.extend(self._all(parts, at))
        return made

    def _dict(self, body: Any, at: str) -> dict[Any, Any]:
        made: dict[Any, Any] = self._begin({})
        for key, each in body:
            found = self.value(key, f"{at} key")
            made[found] = self.value(each, f"{at}[{found!r}]")
        return made

    def _object(self, body: Any, at: str) -> Any:
        name, parts = body
        kind = self._type(name, at)
        if _is_packable(kind):
            place = len(self._objects)
            self._begin(None)
            made = kind.unpack(self.value(parts, at))  # type: ignore[attr-defined]
            self._objects[place] = made
            return made
        fields = [field.name for field in dataclasses.fields(kind)]
        if sorted(parts) != sorted(fields):
            raise PolicyError(
                f"{at}: {name} has the fields {', '.join(fields)}; written were {', '.join(map(str, parts))}"
            )
        made = self._begin(object.__new__(kind))
        for each in fields:
            object.__setattr__(made, each, self.value(parts[each], f"{at}.{each}"))  # frozen ones too
        return made

    def _type(self, name: Any, at: str) -> type:
        if name not in self._types:
            raise PolicyError(
                f"{at}: the policy's state has no type {name!r}; known are {', '.join(sorted(self._types)) or 'none'}"
            )
        return self._types[name]


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name)
    if not isinstance(found, torch.dtype):
        raise TypeError(f"{name!r} is no dtype")
    return found


def _index(body: Any, length: int) -> int:
    if type(body) is not int or not 0 <= body < length:
        raise IndexError(f"{body!r} is not one of {length}")
    return body
