"""Define the format of a stack file as pydantic models, and as JSON Schema for editors.

The registry supplies the policies and their options. ``core.stack.stack`` defines the behaviour of a stack.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import reduce
from operator import or_
from typing import Annotated, Any, Generic, Literal, TypeVar, cast

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, ValidationInfo, create_model

from loopserve.core.errors import ConfigError, foreign_letters
from loopserve.core.guard.faults import constructing
from loopserve.core.policy.interfaces import DecodeCompressor, PrefillSparsifier
from loopserve.core.policy.registry import Kind, Registry
from loopserve.core.policy.wrappers import MAX_NESTING
from loopserve.core.stack.config import Document, InvalidDocument, Location, mistake, mistake_at, parse_strictly, shown

_RANGE = re.compile(r"(-?[0-9]{1,9})-(-?[0-9]{1,9})")
_RangeText = Annotated[str, Field(pattern=r"^-?[0-9]+--?[0-9]+$")]
_MOST_LAYERS = 10_000  # no model has nearly as many
_LARGEST_COUNT = 2**31 - 1  # kernels count tokens and pairs in 32 bits


@dataclass(frozen=True)
class LayerRange:
    """Name the layers from ``first`` to ``last``, both included. Negative indices count from the end."""

    first: int
    last: int

    def resolve(self, total: int) -> range:
        """Return the layers of a model with ``total`` layers. Out-of-range indices stay out of range."""
        first, last = (index + total if index < 0 else index for index in (self.first, self.last))
        return range(first, last + 1)

    def as_written(self) -> int | str:
        return self.first if self.first == self.last else f"{self.first}-{self.last}"


def _range(value: object) -> LayerRange:
    if isinstance(value, int) and not isinstance(value, bool):
        return _within_any_model(LayerRange(value, value))
    if isinstance(value, str):
        match = _RANGE.fullmatch(value.replace(" ", ""))
        if match:
            first, last = int(match[1]), int(match[2])
            if (first < 0) == (last < 0) and first > last:
                raise mistake(f"the range {value!r} is empty: write the lower layer first")
            return _within_any_model(LayerRange(first, last))
    letters = foreign_letters(value) if isinstance(value, str) else ""
    holds = f" (it holds {letters})" if letters else ""
    raise mistake(f"{shown(value)} names no layer{holds}: write a list such as [0, 1, -1], or a range such as '0-3'")


def _within_any_model(layers: LayerRange) -> LayerRange:
    beyond = next((each for each in (layers.first, layers.last) if not -_MOST_LAYERS <= each < _MOST_LAYERS), None)
    if beyond is not None:
        raise mistake(f"no model has a layer {shown(beyond)}: layers are counted from 0, negative ones from the end")
    return layers


def _ranges(value: object) -> tuple[LayerRange, ...]:
    values = value if isinstance(value, list) else [value]
    if not values:
        raise mistake("names no layer: write a list such as [0, 1, -1], or a range such as '0-3'")
    return tuple(_range(each) for each in values)


@dataclass(frozen=True)
class _Maker:
    """Make policies from a stack file; ``depth`` wrappers enclose the policy (``core.policy.wrappers.Maker``)."""

    registry: Registry
    depth: int = 0

    def make(self, kind: Kind, value: Any) -> PrefillSparsifier | DecodeCompressor[Any]:
        example = f"such as {{policy: {next(iter(self.registry.names(kind)), 'NAME')}}}"
        if not isinstance(value, dict) or "policy" not in value:
            raise mistake(f"must name a policy, {example}")
        if self.depth > MAX_NESTING:
            raise mistake(f"policies are nested deeper than {MAX_NESTING} levels")
        name, options = value["policy"], {key: each for key, each in value.items() if key != "policy"}
        if not isinstance(name, str):
            raise mistake_at(("policy",), f"must be the name of a policy, {example}", name)
        for key, each in options.items():
            if type(each) is int and each > _LARGEST_COUNT and key != "seed":
                raise mistake_at(
                    (key,), f"must be at most {_LARGEST_COUNT:,}: tokens and pairs are counted in 32 bits", each
                )
        try:
            registration = self.registry.get(kind, name)
            inside = _Maker(self.registry, self.depth + 1)
            with constructing(kind, name, str(registration.owner)):
                return registration.policy(parse_strictly(registration.config, options, inside))
        except ConfigError as error:
            raise mistake_at(("policy",), str(error), name) from error

    def inner(self, written: Mapping[str, Any]) -> DecodeCompressor[Any]:
        made = self.make(Kind.DECODE, written)
        assert isinstance(made, DecodeCompressor)
        return made


def _policy(kind: Kind) -> Callable[[Any, ValidationInfo], PrefillSparsifier | DecodeCompressor[Any]]:
    """Return a validator that makes a policy from ``{policy: NAME, option: value, ...}``. Its context is a ``_Maker``."""

    def build(value: Any, info: ValidationInfo) -> PrefillSparsifier | DecodeCompressor[Any]:
        return cast(_Maker, info.context).make(kind, value)

    return build


Prefill = TypeVar("Prefill")
Decode = TypeVar("Decode")


class _FileModel(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    @classmethod
    def model_parametrized_name(cls, params: tuple[Any, ...]) -> str:
        return cls.__name__


class LayerConfig(_FileModel, Generic[Prefill, Decode]):
    """Describe the policies that differ in some layers."""

    at: Annotated[
        tuple[LayerRange, ...],
        PlainValidator(_ranges, json_schema_input_type=int | _RangeText | list[int | _RangeText]),
    ] = Field(description="Layers, as [0, 1, -1] or '0-3'; negative ones count from the end.")
    prefill: Prefill | None = Field(None, description="Replaces the stack's prefill policy in these layers.")
    decode: Decode | None = Field(None, description="Replaces the stack's decode policy in these layers.")


class StackConfig(_FileModel, Generic[Prefill, Decode]):
    """Describe a stack file. Generic over the form of a policy: an object made by the registry, or its JSON Schema."""

    version: Literal[1] = Field(1, description="Version of this format.")
    name: str | None = Field(None, min_length=1, description="Shown in reports; the file's name if not given.")
    description: str | None = Field(None, description="What the stack is for.")
    prefill: Prefill = Field(description="How a new turn's tokens attend.")
    decode: Decode = Field(description="Which stored pairs decoding attends to.")
    layers: tuple[LayerConfig[Prefill, Decode], ...] = Field(
        (), description="Exceptions for some layers; the first entry that names a layer counts, for both of its parts."
    )


_Checked: Any = StackConfig[
    Annotated[PrefillSparsifier, PlainValidator(_policy(Kind.PREFILL))],
    Annotated[DecodeCompressor[Any], PlainValidator(_policy(Kind.DECODE))],
]


def read_stack(document: Document, registry: Registry) -> StackConfig[PrefillSparsifier, DecodeCompressor[Any]]:
    """Return a document as a stack of policy objects. Raises InvalidDocument that names every mistake in it."""

    def known_options(at: Location) -> Iterable[str] | None:
        if not at:
            return StackConfig.model_fields
        if at[0] == "layers" and len(at) == 2:
            return LayerConfig.model_fields
        kind = next((Kind(part) for part in at if part in list(Kind)), None)
        if kind is None:
            return None
        value = document.data
        for part in at:
            value = value[part]
        known = isinstance(value, Mapping) and value.get("policy") in registry.names(kind)
        return ["policy", *registry.get(kind, value["policy"]).config.model_fields] if known else None

    if not isinstance(document.data, Mapping):
        shape = document.problem((), f"a stack is a mapping with the keys {', '.join(StackConfig.model_fields)}")
        raise InvalidDocument([*document.problems, shape])
    parsed: StackConfig[PrefillSparsifier, DecodeCompressor[Any]] = document.parse(
        _Checked, context=_Maker(registry), known_options=known_options
    )
    return parsed


def stack_schema(registry: Registry) -> dict[str, Any]:
    """Return the JSON Schema of a stack file with the options of every registered policy, distinguished by ``policy``."""
    prefill, decode = (_written(registry, kind) for kind in Kind)
    schema: dict[str, Any] = StackConfig[prefill, decode].model_json_schema()  # type: ignore[valid-type]
    long_name = next((name for name in schema["$defs"] if name.startswith(LayerConfig.__name__)), LayerConfig.__name__)
    schema = json.loads(json.dumps(schema).replace(long_name, LayerConfig.__name__))
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "loopserve stack"}


def _written(registry: Registry, kind: Kind) -> Any:
    """Return the union of the written forms of all policies of a kind: their options, and the name."""
    models: list[Any] = [
        create_model(
            f"{kind}_{each.name}",
            __base__=each.config,
            __doc__=each.summary,
            policy=(cast(Any, Literal[each.name]), Field(description=each.summary)),
        )
        for each in registry
        if each.kind is kind
    ]
    return Annotated[reduce(or_, models), Field(discriminator="policy")] if len(models) > 1 else models[0]
