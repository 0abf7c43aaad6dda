"""Read YAML safely and report the place of every mistake. Depends on files, fields and models, not on stacks.

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
from ruamel.yaml.events import CollectionEndEvent, CollectionStartEvent, NodeEvent
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from ruamel.yaml.reader import ReaderError

from loopserve.core.errors import ConfigError, did_you_mean, foreign_letters

# A mistaken file is refused early, so that reading it takes well below a second.
MAX_BYTES = 1 << 18
MAX_VALUES = 20_000  # in the file, and again with aliases resolved: a few nested ones could expand to billions
MAX_DEPTH = 32
MAX_PROBLEMS = 50  # number listed one by one
MAX_INTEGER = 2**63 - 1

Location = tuple[str | int, ...]
KnownOptions = Callable[[Location], Iterable[str] | None]
Model = TypeVar("Model", bound=BaseModel)

_TAG = "tag:yaml.org,2002:"
_PLAIN_SCALARS = frozenset(_TAG + name for name in ("str", "int", "float", "bool", "null"))
_SHOWN = 60  # characters of a wrong value quoted in a message
_WHOLE = frozenset({"value_error", "mistake"})  # kinds of error whose message is complete


@dataclass(frozen=True)
class Problem:
    """Hold one mistake: the document, the line (None without a file), the dotted field (may be empty), the message."""

    source: str
    line: int | None
    field: str
    message: str

    def __str__(self) -> str:
        where = self.source if self.line is None else f"{self.source}:{self.line}"
        return ": ".join(part for part in (where, self.field, self.message) if part)


class InvalidDocument(ConfigError):
    """Report every mistake of one document."""

    def __init__(self, problems: Iterable[Problem], more: int = 0) -> None:
        """Report these problems. more: number of further mistakes."""
        listed = sorted(problems, key=lambda each: each.line or 0)
        more += max(len(listed) - MAX_PROBLEMS, 0)
        if more:
            rest = f"and {more:,} more mistakes; is this the right file?"
            listed = [*listed[:MAX_PROBLEMS], Problem(listed[0].source, None, "", rest)]
        self.problems = tuple(listed)
        super().__init__("\n".join(map(str, self.problems)))


@dataclass(frozen=True)
class Document:
    """Hold plain data with its origin. ``lines`` holds the line of each field, if there is a file."""

    data: Any
    source: str
    lines: Mapping[Location, int] = field(default_factory=dict)
    problems: tuple[Problem, ...] = ()  # found while reading, reported together with those of the validation

    def problem(self, at: Location, message: str) -> Problem:
        """Return a mistake in the field ``at``. A missing field gets the line of its parent."""
        line = next((self.lines[at[:end]] for end in range(len(at), -1, -1) if at[:end] in self.lines), None)
        return Problem(self.source, line, dotted(at), message)

    def parse(
        self,
        model: type[Model],
        *,
        context: Any = None,
        known_options: KnownOptions | None = None,
    ) -> Model:
        """Return the data as ``model``, without conversion (``"8"`` and ``true`` are no numbers). Raises InvalidDocument.

        known_options: the names allowed inside the field at a location (None = not known), for suggestions.
        """
        problems = [*self.problems, *self._oversized(self.data, ())]
        more = 0
        try:
            parsed = parse_strictly(model, self.data, context)
            if not problems:
                return parsed
        except ValidationError as error:
            reported = {(each.field, each.line) for each in problems}
            mistakes = error.errors(include_url=False)
            more = max(len(mistakes) - MAX_PROBLEMS, 0)
            explained = [self._explain(each, known_options) for each in mistakes[:MAX_PROBLEMS]]
            problems += [each for each in explained if (each.field, each.line) not in reported]
        except ValueError as error:  # from to_json: not plain data
            problems.append(self.problem((), f"holds a value that is no plain data: {error}"))
        raise InvalidDocument(problems, more)

    def _oversized(self, value: Any, at: Location) -> Iterable[Problem]:
        """Return the problems of integers that JSON readers or tensors cannot hold."""
        if isinstance(value, int) and not -MAX_INTEGER <= value <= MAX_INTEGER:
            yield self.problem(at, f"must be between -{MAX_INTEGER:,} and {MAX_INTEGER:,} (got {shown(value)})")
        if len(at) <= MAX_DEPTH and isinstance(value, Mapping | list | tuple):
            entries = value.items() if isinstance(value, Mapping) else enumerate(value)
            for key, each in entries:
                yield from self._oversized(each, (*at, key if isinstance(key, int) else str(key)))

    def _explain(self, error: Any, known_options: KnownOptions | None) -> Problem:
        at: Location = error["loc"]
        kind, value, message = error["type"], error["input"], error["msg"].removeprefix("Value error, ")
        if kind == "extra_forbidden":
            known = known_options(at[:-1]) if known_options is not None else None
            return self.problem(at, "unknown key" + (did_you_mean(str(at[-1]), known) if known is not None else ""))
        if kind == "missing":
            return self.problem(at, "this key is required")
        if kind not in _WHOLE and not isinstance(value, Mapping | list):
            letters = foreign_letters(value) if isinstance(value, str) else ""
            message += f" (got {shown(value)}{f': it holds {letters}' if letters else ''})"
        return self.problem(at, message)


def mistake(message: str) -> PydanticCustomError:
    """Return the error that a validator raises when its message is complete."""
    return PydanticCustomError("mistake", "{message}", {"message": message})


def mistake_at(at: Location, message: str, value: Any) -> ValidationError:
    """Return the same error for a field inside the value that is validated."""
    details = InitErrorDetails(type=mistake(message), loc=at, input=value)
    return ValidationError.from_exception_data("mistake", [details])


def parse_strictly(model: type[Model], data: Any, context: Any = None) -> Model:
    """Validate as JSON is validated: names become enums, lists become tuples, and no number is made from a string or a bool."""
    return model.model_validate_json(to_json(data, inf_nan_mode="constants"), strict=True, context=context)


def dotted(at: Location) -> str:
    """Return a location as text, such as ``layers[0].decode.budget``."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{_one_line(part)}" for part in at).removeprefix(".")


def _one_line(text: str) -> str:
    """Return a text fit for a message: shortened, and without control characters of a terminal."""
    cut = text if len(text) <= _SHOWN else text[:_SHOWN] + "..."
    return cut if cut.isprintable() else "".join(each if each.isprintable() else ascii(each)[1:-1] for each in cut)


def shown(value: Any) -> str:
    """Return a wrong value as one short line for a message."""
    try:
        return _one_line(repr(value))
    except ValueError:  # an integer of thousands of digits
        return f"an integer of {value.bit_length()} bits"


def read_yaml(path: Path, source: str | None = None) -> Document:
    """Return a YAML file as a document. Raises ConfigError if it cannot be read, InvalidDocument if it is not valid YAML."""
    source = source or str(path)
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{source}: cannot be read: {error.strerror or error}") from error
    if len(content) > MAX_BYTES:
        raise ConfigError(
            f"{source}: larger than {MAX_BYTES >> 10} KiB: loopserve reads no such file; is it the right one?"
        )
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        remedy = "it starts as UTF-16 does: " if content[:2] in (b"\xff\xfe", b"\xfe\xff") else ""
        raise ConfigError(f"{source}:{line}: not UTF-8 text (byte {error.start}): {remedy}save it as UTF-8") from error
    return parse_yaml(text, source)


def parse_yaml(text: str, source: str) -> Document:
    """Return YAML text as a document. Invalid YAML is refused. Duplicate keys and similar mistakes are listed in ``problems``."""

    def broken(line: int | None, message: str) -> InvalidDocument:
        return InvalidDocument([Problem(source, line, "", message)])

    try:
        _require_modest(text, broken)
        root = YAML(typ="safe", pure=True).compose(io.StringIO(text))
    except ReaderError as error:
        character = error.character if isinstance(error.character, str) else chr(error.character)
        line = text.count("\n", 0, max(text.find(character), 0)) + 1
        raise broken(line, f"broken YAML: {foreign_letters(character)} may not stand in a file of text") from error
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        reason = _one_line_of(", ".join(str(part) for part in (error.context, error.problem) if part))
        if "'\\t'" in reason:
            reason += ": indent with spaces"
        if mark and (letters := _invisible(text.split("\n")[mark.line : mark.line + 1])):
            reason += f"; the line holds {letters}"
        raise broken(mark.line + 1 if mark else None, f"broken YAML: {reason}") from error
    except YAMLError as error:
        raise broken(None, f"broken YAML: {_one_line_of(str(error))}") from error
    if root is None:
        raise broken(None, "the file is empty")
    reader = _Reader(source)
    data = reader.value(root, ())
    return Document(data, source, reader.lines, tuple(reader.problems))


def _require_modest(text: str, broken: Callable[[int | None, str], InvalidDocument]) -> None:
    """Refuse a text with too many values or nesting levels while its events are read, before a tree is built."""
    values = depth = 0
    for event in YAML(typ="safe", pure=True).parse(io.StringIO(text)):
        values += isinstance(event, NodeEvent)
        depth += isinstance(event, CollectionStartEvent) - isinstance(event, CollectionEndEvent)
        if values > MAX_VALUES or depth > MAX_DEPTH:
            limit = (
                f"nested deeper than {MAX_DEPTH} levels"
                if depth > MAX_DEPTH
                else f"holds more than {MAX_VALUES:,} values"
            )
            raise broken(event.start_mark.line + 1, f"{limit}: loopserve reads no such file; is it the right one?")


def _invisible(lines: Iterable[str]) -> str:
    """Return the characters between words that an editor does not show, or shows as a blank."""
    return foreign_letters("".join(each for line in lines for each in line if each != "\t" and not each.isprintable()))


def _reason(error: Exception) -> str:
    reason = _one_line_of(str(error))
    return "it has thousands of digits" if "integer string conversion" in reason else reason


def _one_line_of(text: str) -> str:
    return " ".join(text.split())


def to_yaml(data: Any) -> str:
    """Return plain data as YAML text, keys in the order given."""
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]  # ruamel declares it as None
    text = io.StringIO()
    yaml.dump(data, text)
    return text.getvalue()


class _Reader:
    """Turn YAML nodes into plain data, and record lines and mistakes."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.lines: dict[Location, int] = {}
        self.problems: list[Problem] = []
        self._constructor = YAML(typ="safe", pure=True).constructor
        self._values = 0
        self._around: list[Node] = []  # the nodes that contain the value which is being read

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
            limit = f"holds more than {MAX_VALUES:,} values or {MAX_DEPTH} levels, with aliases followed"
            raise InvalidDocument([Problem(self.source, node.start_mark.line + 1, "", limit)])
        tag = str(node.tag)
        if isinstance(node, MappingNode) and tag == _TAG + "map":
            return self._mapping(node, at)
        if isinstance(node, SequenceNode) and tag == _TAG + "seq":
            return [self.value(item, (*at, index)) for index, item in enumerate(node.value)]
        if isinstance(node, ScalarNode) and tag in _PLAIN_SCALARS:
            return self._scalar(node, at)
        self._note(
            node, at, f"a value of type {shown(tag.removeprefix(_TAG))} has no place here; quote it if it is text"
        )
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
            self._note(node, at, f"not a {str(node.tag).removeprefix(_TAG)}: {_reason(error)}")
            return None

    def _note(self, node: Node, at: Location, message: str) -> None:
        self.problems.append(Problem(self.source, node.start_mark.line + 1, dotted(at), message))
