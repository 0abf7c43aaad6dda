"""Reads YAML safely and says of every mistake where it stands. Knows files, fields and models, no stack.

All mistakes of a document are collected and raised as one ``InvalidDocument``, one line each::

    my.yaml:3: decode.budget: Input should be greater than 0 (got -3)
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError, to_json
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from loopserve.core.errors import ConfigError, did_you_mean

MAX_BYTES = 1 << 20
MAX_VALUES = 20_000  # after aliases are followed: a few nested ones could stand for billions
MAX_DEPTH = 32

Location = tuple[str | int, ...]
KnownOptions = Callable[[Location], Iterable[str] | None]
Model = TypeVar("Model", bound=BaseModel)

_TAG = "tag:yaml.org,2002:"
_PLAIN_SCALARS = frozenset(_TAG + name for name in ("str", "int", "float", "bool", "null"))
_SHOWN = 60  # characters of a wrong value quoted in a message
_WHOLE = frozenset({"value_error", "mistake"})  # kinds of error whose message says it all


@dataclass(frozen=True)
class Problem:
    """One mistake: the document, the line (None without a file), the dotted field (may be empty), what is wrong."""

    source: str
    line: int | None
    field: str
    message: str

    def __str__(self) -> str:
        where = self.source if self.line is None else f"{self.source}:{self.line}"
        return ": ".join(part for part in (where, self.field, self.message) if part)


class InvalidDocument(ConfigError):
    """Every mistake of one document."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(sorted(problems, key=lambda each: each.line or 0))
        super().__init__("\n".join(map(str, self.problems)))


@dataclass(frozen=True)
class Document:
    """Plain data with its origin; ``lines`` tells where each field stands, as far as there is a file."""

    data: Any
    source: str
    lines: Mapping[Location, int] = field(default_factory=dict)
    problems: tuple[Problem, ...] = ()  # found in reading, reported together with what validation finds

    def problem(self, at: Location, message: str) -> Problem:
        """A mistake in the field ``at``; a field that is missing is placed where its parent stands."""
        line = next((self.lines[at[:end]] for end in range(len(at), -1, -1) if at[:end] in self.lines), None)
        return Problem(self.source, line, dotted(at), message)

    def parse(
        self,
        model: type[Model],
        *,
        context: Any = None,
        known_options: KnownOptions | None = None,
    ) -> Model:
        """The data as ``model``, without guessing (``"8"`` and ``true`` are no numbers). InvalidDocument if it is not.

        known_options: the names allowed inside the field at a location (None = not known), for suggestions.
        """
        problems = list(self.problems)
        try:
            parsed = parse_strictly(model, self.data, context)
            if not problems:
                return parsed
        except ValidationError as error:
            reported = {(each.field, each.line) for each in problems}
            explained = [self._explain(each, known_options) for each in error.errors(include_url=False)]
            problems += [each for each in explained if (each.field, each.line) not in reported]
        except ValueError as error:  # from to_json: no plain data
            problems.append(self.problem((), f"holds a value that is no plain data: {error}"))
        raise InvalidDocument(problems)

    def _explain(self, error: Any, known_options: KnownOptions | None) -> Problem:
        at: Location = error["loc"]
        kind, value, message = error["type"], error["input"], error["msg"].removeprefix("Value error, ")
        if kind == "extra_forbidden":
            known = known_options(at[:-1]) if known_options is not None else None
            return self.problem(at, "unknown key" + (did_you_mean(str(at[-1]), known) if known is not None else ""))
        if kind == "missing":
            return self.problem(at, "this key is required")
        if kind not in _WHOLE and not isinstance(value, Mapping | list):
            shown = repr(value)
            message += f" (got {shown if len(shown) <= _SHOWN else shown[:_SHOWN] + '...'})"
        return self.problem(at, message)


def mistake(message: str) -> PydanticCustomError:
    """What a validator raises when its message says all there is to say."""
    return PydanticCustomError("mistake", "{message}", {"message": message})


def mistake_at(at: Location, message: str, value: Any) -> ValidationError:
    """The same for a field inside the value that is validated."""
    details = InitErrorDetails(type=mistake(message), loc=at, input=value)
    return ValidationError.from_exception_data("mistake", [details])


def parse_strictly(model: type[Model], data: Any, context: Any = None) -> Model:
    """Validate as JSON is: names for enums, lists for tuples are welcome; no number is made of a string or a bool."""
    return model.model_validate_json(to_json(data, inf_nan_mode="constants"), strict=True, context=context)


def dotted(at: Location) -> str:
    """``layers[0].decode.budget``"""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in at).removeprefix(".")


def read_yaml(path: Path, source: str | None = None) -> Document:
    """A YAML file as a document. ConfigError if it cannot be read, InvalidDocument if it is no clean YAML."""
    source = source or str(path)
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{source}: cannot be read: {error.strerror or error}") from error
    if len(content) > MAX_BYTES:
        raise ConfigError(f"{source}: larger than {MAX_BYTES >> 20} MiB: this is no stack file")
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{source}: not UTF-8 text (byte {error.start})") from error
    return parse_yaml(text, source)


def parse_yaml(text: str, source: str) -> Document:
    """YAML text as a document. What is no YAML is refused; duplicate keys and the like are noted in ``problems``."""
    try:
        root = YAML(typ="safe", pure=True).compose(io.StringIO(text))
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        reason = " ".join(", ".join(str(part) for part in (error.context, error.problem) if part).split())
        line = mark.line + 1 if mark else None
        raise InvalidDocument([Problem(source, line, "", f"broken YAML: {reason}")]) from error
    except YAMLError as error:
        raise InvalidDocument([Problem(source, None, "", f"broken YAML: {' '.join(str(error).split())}")]) from error
    except RecursionError:
        raise InvalidDocument([Problem(source, None, "", f"nested deeper than {MAX_DEPTH} levels")]) from None
    if root is None:
        raise InvalidDocument([Problem(source, None, "", "the file is empty")])
    reader = _Reader(source)
    data = reader.value(root, ())
    return Document(data, source, reader.lines, tuple(reader.problems))


def to_yaml(data: Any) -> str:
    """Plain data as YAML text, keys in the order given."""
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]  # ruamel declares it as None
    text = io.StringIO()
    yaml.dump(data, text)
    return text.getvalue()


class _Reader:
    """Turns YAML nodes into plain data, noting lines and mistakes on the way."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.lines: dict[Location, int] = {}
        self.problems: list[Problem] = []
        self._constructor = YAML(typ="safe", pure=True).constructor
        self._values = 0
        self._around: list[Node] = []  # what the value that is being read stands in

    def value(self, node: Node, at: Location) -> Any:
        if any(node is each for each in self._around):
            endless = "refers to itself: an alias may not stand inside what it names"
            raise InvalidDocument(
                [Problem(self.source, self.lines.get(at, node.start_mark.line + 1), dotted(at), endless)]
            )
        self._around.append(node)
        found = self._content(node, at)
        self._around.pop()
        return found

    def _content(self, node: Node, at: Location) -> Any:
        self._values += 1
        self.lines.setdefault(at, node.start_mark.line + 1)
        if self._values > MAX_VALUES or len(at) > MAX_DEPTH:
            limit = f"holds more than {MAX_VALUES} values or {MAX_DEPTH} levels, with aliases followed"
            raise InvalidDocument([Problem(self.source, node.start_mark.line + 1, "", limit)])
        tag = str(node.tag)
        if isinstance(node, MappingNode) and tag == _TAG + "map":
            return self._mapping(node, at)
        if isinstance(node, SequenceNode) and tag == _TAG + "seq":
            return [self.value(item, (*at, index)) for index, item in enumerate(node.value)]
        if isinstance(node, ScalarNode) and tag in _PLAIN_SCALARS:
            return self._scalar(node, at)
        self._note(node, at, f"a value of type {tag.removeprefix(_TAG)!r} has no place here; quote it if it is text")
        return None

    def _mapping(self, node: MappingNode, at: Location) -> dict[str, Any]:
        found: dict[str, Any] = {}
        first: dict[str, int] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, ScalarNode):
                self._note(key_node, at, "a key must be a single word")
                continue
            key = key_node.value
            if key in found:
                self._note(key_node, (*at, key), f"duplicate key, first given in line {first[key]}")
                continue
            first[key] = self.lines[*at, key] = line
            found[key] = self.value(value_node, (*at, key))
        return found

    def _scalar(self, node: ScalarNode, at: Location) -> Any:
        try:
            return self._constructor.construct_object(node)
        except (YAMLError, ValueError) as error:
            self._note(node, at, f"not a {str(node.tag).removeprefix(_TAG)}: {' '.join(str(error).split())}")
            return None

    def _note(self, node: Node, at: Location, message: str) -> None:
        self.problems.append(Problem(self.source, node.start_mark.line + 1, dotted(at), message))
