"""Define a stack: which sparsifier and which compressor serves each layer. Made from a preset, a YAML file or a dict; frozen.

``pairs`` combines every prefill policy with every decode policy: which work, and why the others are refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from loopserve.core.errors import ConfigError, did_you_mean
from loopserve.core.guard.faults import Owners, blamed
from loopserve.core.kv.selection import Retention
from loopserve.core.policy.interfaces import DecodeCompressor, PrefillSparsifier
from loopserve.core.policy.layers import LayerSpec, LayerType, Need
from loopserve.core.policy.registry import Kind, Registration, Registry
from loopserve.core.policy.wrappers import written
from loopserve.core.stack.config import Document, parse_yaml, read_yaml
from loopserve.core.stack.stack_file import LayerRange, read_stack

_SUFFIXES = (".yaml", ".yml")
_INNER = "snapkv"  # the policy inside a wrapper that is listed on its own
_NEUTRAL = {Kind.PREFILL: "dense", Kind.DECODE: "full"}


@dataclass(frozen=True)
class Override:
    """Hold policies for some layers. None means the policy of the stack."""

    at: tuple[LayerRange, ...]
    prefill: PrefillSparsifier | None = None
    decode: DecodeCompressor[Any] | None = None

    @property
    def passive(self) -> bool:
        """Return whether it only leaves layers as the model has them."""
        return all(each is None or each.capabilities.passive for each in (self.prefill, self.decode))

    def covers(self, index: int, total: int) -> bool:
        return any(index in each.resolve(total) for each in self.at)


@dataclass(frozen=True, eq=False)
class PolicyStack:
    """Hold one sparsifier and one compressor per layer. All sessions share the policies.

    Stacks are equal if their ``describe()`` is.
    """

    name: str
    prefill: PrefillSparsifier
    decode: DecodeCompressor[Any]
    overrides: tuple[Override, ...] = ()
    source: str = "python"
    description: str | None = None
    owners: Owners = field(default_factory=dict)  # the distribution of each policy class, if known

    def prefill_for(self, layer_index: int, layers_total: int) -> PrefillSparsifier:
        override = self._override(layer_index, layers_total)
        return override.prefill if override and override.prefill else self.prefill

    def decode_for(self, layer_index: int, layers_total: int) -> DecodeCompressor[Any]:
        override = self._override(layer_index, layers_total)
        return override.decode if override and override.decode else self.decode

    def _override(self, index: int, total: int) -> Override | None:
        return next((each for each in self.overrides if each.covers(index, total)), None)

    @property
    def is_dense(self) -> bool:
        """Return whether every layer attends as the model has it."""
        sparsifiers = [self.prefill, *(each.prefill for each in self.overrides if each.prefill)]
        compressors = [self.decode, *(each.decode for each in self.overrides if each.decode)]
        return all(each.capabilities.passive for each in sparsifiers) and all(
            each.capabilities.passive for each in compressors
        )

    def describe(self) -> dict[str, Any]:
        """Return the stack with every option in the form of a stack file. ``resolve_stack`` makes an equal stack from it."""
        described: dict[str, Any] = {"version": 1, "name": self.name}
        if self.description is not None:
            described["description"] = self.description
        described |= {"prefill": written(self.prefill), "decode": written(self.decode)}
        if self.overrides:
            described["layers"] = [
                {"at": [layers.as_written() for layers in each.at]}
                | ({"prefill": written(each.prefill)} if each.prefill else {})
                | ({"decode": written(each.decode)} if each.decode else {})
                for each in self.overrides
            ]
        return described

    @property
    def digest(self) -> str:
        """Return a digest that is equal for stacks with the same behaviour, whatever their names are."""
        acting = {key: value for key, value in self.describe().items() if key not in ("name", "description")}
        return hashlib.sha256(json.dumps(acting, sort_keys=True).encode()).hexdigest()[:16]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PolicyStack) and self.describe() == other.describe()

    def __hash__(self) -> int:
        return hash(self.digest)

    def check(self, layers: Sequence[LayerSpec], *, batch: bool = False) -> None:
        """Raise ConfigError, naming policy, layer and remedy, if a policy cannot serve these layers (or a batch of rows)."""
        problems = [*self._misplaced(layers)] if layers else []
        served: dict[tuple[Kind, PrefillSparsifier | DecodeCompressor[Any]], list[int]] = {}
        refused: dict[str, list[int]] = {}
        for layer in layers:
            if layer.type is LayerType.FULL:
                prefill = self.prefill_for(layer.index, len(layers))
                decode = self.decode_for(layer.index, len(layers))
                served.setdefault((Kind.PREFILL, prefill), []).append(layer.index)
                served.setdefault((Kind.DECODE, decode), []).append(layer.index)
                for reason in pair_refusals(prefill, decode, layer, owners=self.owners):
                    refused.setdefault(reason, []).append(layer.index)
        if not served and not self.is_dense:
            problems.append("the model has no full-attention layer, so no policy would ever act: use the stack 'dense'")
        fixed = [layer.index for layer in layers if not layer.repeatable]
        shared = {each.reads for each in layers if each.reads is not None}
        shared |= {each.index for each in layers if each.reads is not None}
        for (kind, policy), indices in served.items():
            where = f"{kind} policy {policy.name!r} at {_spoken(indices)}"
            with blamed(policy, "its declaration", self.owners):
                problems += [f"{where} {inability}" for inability in _inabilities(policy, batch)]
                if fixed and policy.effective_capabilities.observes:
                    problems.append(
                        f"{where} asks for rows of a turn to be computed again, which {_spoken(fixed)} of this model cannot do "
                        "(a recurrent state, or positions that are counted): choose a stack without observations, such as "
                        "'loopserve', 'snapkv' or 'dense'"
                    )
                evicts = isinstance(policy, DecodeCompressor) and policy.retention is Retention.EVICT
                if both := sorted(shared.intersection(indices)) if evicts else []:
                    problems.append(
                        f"{where} evicts pairs, which {_spoken(both)} of this model share: set its retention to keep"
                    )
        problems += [f"at {_spoken(indices)}, {reason}" for reason, indices in refused.items()]
        if problems:
            raise ConfigError("\n".join(f"stack {self.name!r}: {problem}" for problem in problems))

    def _misplaced(self, layers: Sequence[LayerSpec]) -> Iterable[str]:
        """Return the overrides that name layers which do not exist, or which no policy serves."""
        total = len(layers)
        for number, override in enumerate(self.overrides):
            named = {index for each in override.at for index in each.resolve(total)}
            beyond = sorted(index for index in named if not 0 <= index < total)
            if beyond or not named:
                given = ", ".join(str(each.as_written()) for each in override.at)
                yield f"layers[{number}].at: {given} does not fit the model, which has layers 0 to {total - 1}"
            for layer in () if override.passive else layers:  # sliding layers are never changed
                if layer.type is not LayerType.FULL and self._override(layer.index, total) is override:
                    yield (
                        f"layers[{number}].at: layer {layer.index} is a {layer.type} layer, which stays as the model "
                        "has it: take it out of 'at'"
                    )


def pair_refusals(
    prefill: PrefillSparsifier,
    decode: DecodeCompressor[Any],
    layer: LayerSpec | None = None,
    retention: Retention | None = None,
    owners: Owners | None = None,
) -> Iterable[str]:
    """Return why two policies cannot work together (in a layer, if one is given); empty if they can.

    retention: of the decode policy, in place of its own.
    """
    pair: tuple[tuple[Kind, PrefillSparsifier | DecodeCompressor[Any]], ...]
    pair = ((Kind.PREFILL, prefill), (Kind.DECODE, decode))
    for kind, policy in pair:
        with blamed(policy, "its declaration", owners or {}):
            needs = sorted(policy.effective_capabilities.needs)
            reason = policy.refuses(layer) if layer is not None else None
        for need in needs:
            lack = layer.lacks(need) if layer is not None else None
            if lack is not None:
                yield f"{kind} policy {policy.name!r} needs the layer's {need}: {lack}"
        if reason is not None:
            yield f"{kind} policy {policy.name!r} {reason}"
    if Need.FULL_HISTORY in prefill.effective_capabilities.needs and (retention or decode.retention) is Retention.EVICT:
        yield (
            f"prefill policy {prefill.name!r} needs every pair of the conversation, and decode policy {decode.name!r} "
            "evicts: set its retention to keep, or choose another prefill policy"
        )


def _inabilities(policy: PrefillSparsifier | DecodeCompressor[Any], batch: bool) -> Iterable[str]:
    able = policy.effective_capabilities
    if LayerType.FULL not in able.layer_types:
        yield f"serves only {_listed(able.layer_types)} layers: choose another policy there"
    if isinstance(policy, DecodeCompressor) and policy.retention not in able.retentions:
        yield f"cannot {policy.retention} pairs: set retention: {' or '.join(sorted(able.retentions))}"
    if batch and not able.batched:
        yield "cannot serve a batch: send its rows one at a time, or choose another policy"


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))


def _spoken(indices: Sequence[int]) -> str:
    """Return layer indices as text, such as ``layer 3`` or ``layers 0-2, 5``."""
    spans: list[list[int]] = []
    for index in indices:
        if spans and index == spans[-1][-1] + 1:
            spans[-1][1:] = [index]
        else:
            spans.append([index])
    text = ", ".join("-".join(map(str, span)) for span in spans)
    return f"layer{'s' if len(indices) > 1 else ''} {text}"


def resolve_stack(spec: str | Path | Mapping[str, Any] | PolicyStack, registry: Registry) -> PolicyStack:
    """Make a stack from a preset's name, a YAML file or a dict of the same form, with the policies of a registry.

    ``loopserve.load_stack`` does the same with the installed plugins. Raises ConfigError that names every mistake.
    """
    if isinstance(spec, PolicyStack):
        return spec
    if isinstance(spec, Mapping):
        return _assemble(Document(dict(spec), "stack"), registry, default_name="custom")
    if not isinstance(spec, str | Path):
        raise ConfigError(
            f"a stack is a preset's name, a YAML file, a dict or a PolicyStack, not {type(spec).__name__}"
        )
    path = Path(spec)
    if isinstance(spec, str) and spec in preset_names():
        preset = preset_file(spec)
        return _assemble(parse_yaml(preset.read_text("utf-8"), f"preset {preset.name}"), registry, default_name=spec)
    if isinstance(spec, str) and path.suffix not in _SUFFIXES and not path.is_file():
        raise ConfigError(
            f"unknown stack {spec!r}{did_you_mean(spec, preset_names())}, or give the path of a YAML file"
        )
    return _assemble(read_yaml(path), registry, default_name=path.stem)


def preset_names() -> list[str]:
    return sorted(Path(each.name).stem for each in _presets().iterdir() if each.name.endswith(_SUFFIXES))


def preset_file(name: str) -> Traversable:
    return _presets() / f"{name}.yaml"


def _presets() -> Traversable:
    return resources.files("loopserve") / "stacks"


def _assemble(document: Document, registry: Registry, default_name: str) -> PolicyStack:
    config = read_stack(document, registry)
    return PolicyStack(
        name=config.name or default_name,
        prefill=config.prefill,
        decode=config.decode,
        overrides=tuple(Override(each.at, each.prefill, each.decode) for each in config.layers),
        source=document.source,
        description=config.description,
        owners={each.policy: str(each.owner) for each in registry},
    )


@dataclass(frozen=True)
class Pair:
    """Hold one prefill and one decode policy with default options, the retention, and why they are refused; None = they work."""

    prefill: str
    decode: str
    retention: Retention
    reason: str | None


def pairs(registry: Registry) -> Iterator[Pair]:
    """Return the prefill policies by name, each with every decode policy under every retention."""
    made = {each: _as_it_comes(each, registry) for each in registry}
    for first in (each for each in registry if each.kind is Kind.PREFILL):
        for second in (each for each in registry if each.kind is Kind.DECODE):
            for retention in Retention:
                reason = _reason(made[first], made[second], retention)
                yield Pair(first.name, second.name, retention, reason)


def _as_it_comes(policy: Registration, registry: Registry) -> PrefillSparsifier | DecodeCompressor[Any] | str:
    """Return the policy with default options (a wrapper around another one), or why it cannot be made."""
    written: dict[str, Any] = {"policy": policy.name}
    if "inner" in policy.config.model_fields:
        written["inner"] = {"policy": _INNER}
    spec = {str(kind): {"policy": name} for kind, name in _NEUTRAL.items()} | {str(policy.kind): written}
    try:
        stack = resolve_stack(spec, registry)
    except ConfigError as error:
        return f"cannot be made without options: {error}"
    return stack.prefill if policy.kind is Kind.PREFILL else stack.decode


def _reason(prefill: Any, decode: Any, retention: Retention) -> str | None:
    for made in (prefill, decode):
        if isinstance(made, str):
            return made
    if retention not in decode.effective_capabilities.retentions:
        return f"decode policy {decode.name!r} cannot {retention} pairs"
    return next(iter(pair_refusals(prefill, decode, retention=retention)), None)
