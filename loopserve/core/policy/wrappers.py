"""Put a policy inside a policy: the type of a wrapper's option ``inner``, and the steps that all wrappers share.

It is written as ``inner: {policy: NAME, option: value}``. The validation of a wrapper's options gets a ``Maker`` as context, which
has access to the registry. In Python, a policy object is used as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Protocol

from pydantic import Field, PlainSerializer, PlainValidator, ValidationInfo, WithJsonSchema, model_validator
from torch import Tensor

from loopserve.core.kv.selection import KVSelection, Retention
from loopserve.core.policy.base import Capabilities, PolicyConfig
from loopserve.core.policy.interfaces import AttentionInputs, DecodeCompressor, Observation, Step
from loopserve.core.policy.layers import LayerSpec
from loopserve.core.policy.scoring import ScoredCompressor, ScoredConfig, ScoredState
from loopserve.core.stack.config import mistake, mistake_at

MAX_NESTING = 4
_EXAMPLE = "such as {policy: snapkv}"


class Maker(Protocol):
    """Make policies from their form in a stack file."""

    def inner(self, written: Mapping[str, Any]) -> DecodeCompressor[Any]:
        """Return the decode policy of an option ``inner``, one nesting level deeper."""


def written(policy: Any) -> dict[str, Any]:
    """Return a policy in the form of a stack file, with every option."""
    return {"policy": policy.name, **policy.config.model_dump(mode="json")}


def _any(value: Any, info: ValidationInfo) -> DecodeCompressor[Any]:
    policy = value
    if isinstance(value, dict):
        if info.context is None:
            raise mistake(
                "a policy written as a mapping is made by load_stack; in Python give the policy object itself"
            )
        policy = info.context.inner(value)
    if not isinstance(policy, DecodeCompressor):
        raise mistake(f"must name a policy, {_EXAMPLE}")
    return policy


def _scored(value: Any, info: ValidationInfo) -> ScoredCompressor:
    policy = _any(value, info)
    if not isinstance(policy, ScoredCompressor):
        reason = f"decode policy {policy.name!r} gives no score per pair, so it cannot be wrapped"
        raise mistake_at(("policy",), reason, policy.name)
    return policy


def _schema(described: str) -> WithJsonSchema:
    named = {"policy": {"type": "string", "description": described}}
    return WithJsonSchema({"type": "object", "properties": named, "required": ["policy"]})


ScoredInner = Annotated[
    ScoredCompressor,
    PlainValidator(_scored),
    PlainSerializer(written, return_type=dict[str, Any]),
    _schema("Name of a scored decode policy."),
]
AnyInner = Annotated[
    DecodeCompressor[Any],
    PlainValidator(_any),
    PlainSerializer(written, return_type=dict[str, Any]),
    _schema("Name of a decode policy."),
]


class InnerConfig(PolicyConfig):
    """Refuse options that do not name the policy inside. A wrapper's configuration declares ``inner``."""

    @model_validator(mode="before")
    @classmethod
    def _wraps_something(cls, fields: Any) -> Any:
        if isinstance(fields, dict) and "inner" not in fields:
            raise mistake_at(
                ("inner",), f"this policy wraps another one, which is missing: name it, {_EXAMPLE}", fields
            )
        return fields


class WrapperConfig(InnerConfig):
    """Take the options of every policy that changes how another one uses its scores."""

    inner: ScoredInner = Field(
        description="The policy wrapped, written as {policy: NAME, ...}; it says budget, forced pairs and retention."
    )


def joint_capabilities(own: Capabilities, within: Capabilities) -> Capabilities:
    """Return the capabilities that a wrapper and the policy inside both have, with the needs of either."""
    return Capabilities(
        layer_types=own.layer_types & within.layer_types,
        retentions=own.retentions & within.retentions,
        deterministic=own.deterministic and within.deterministic,
        batched=own.batched and within.batched,
        needs=own.needs | within.needs,
        observes=own.observes or within.observes,
    )


class Wrapping:
    """Answer as the policy inside, ``config.inner``, where a wrapper changes nothing. Precedes the policy's class among the bases."""

    config: Any
    capabilities: ClassVar[Capabilities]
    state_types: ClassVar[tuple[type, ...]]

    @property
    def inner(self) -> Any:
        return self.config.inner

    @property
    def effective_capabilities(self) -> Capabilities:
        """Return the capabilities that both policies have, with the needs of either."""
        return joint_capabilities(self.capabilities, self.inner.effective_capabilities)

    @property
    def effective_state_types(self) -> tuple[type, ...]:
        """Return the types in a state that holds the inner policy's beside its own."""
        return (*self.state_types, type(self.inner.init_state()), *self.inner.effective_state_types)

    @property
    def retention(self) -> Retention:
        found: Retention = self.inner.retention
        return found

    @property
    def reads_again(self) -> int:
        return int(self.inner.reads_again)

    def refuses(self, layer: LayerSpec) -> str | None:
        reason: str | None = self.inner.refuses(layer)
        return reason


class ScoredWrapper(Wrapping, ScoredCompressor):
    """Wrap a scored policy. Each step is that of the inner policy unless a wrapper changes it.

    Budget, sinks, recent window and retention are those of the innermost policy, so wrappers can be nested in any order. Outputs
    are attended in addition to the budget, whatever the inner policy does with them alone.
    """

    class Config(WrapperConfig):
        """Take the policy inside."""

    config: WrapperConfig  # type: ignore[assignment]  # it has no limits of its own, see ``limits``

    @property
    def inner(self) -> ScoredCompressor:
        return self.config.inner

    @property
    def can_be_weighed(self) -> bool:
        return self.inner.can_be_weighed

    @property
    def limits(self) -> ScoredConfig:
        return self.inner.limits

    @property
    def most_pairs(self) -> int | None:
        return self.inner.most_pairs

    @property
    def effective_state_types(self) -> tuple[type, ...]:
        return (*self.state_types, *self.inner.effective_state_types)

    def init_state(self) -> ScoredState:
        return self.inner.init_state()

    def end_turn(self, state: ScoredState) -> None:
        self.inner.end_turn(state)

    def score(self, inputs: AttentionInputs) -> Tensor:
        return self.inner.score(inputs)

    def observe(self, inputs: AttentionInputs, state: ScoredState) -> None:
        self.inner.observe(inputs, state)

    def ranked_call(self, inputs: AttentionInputs, state: ScoredState) -> AttentionInputs | None:
        return self.inner.ranked_call(inputs, state)

    def asks(self, step: Step, state: ScoredState) -> Observation | None:
        return self.inner.asks(step, state)

    def ranking(self, inputs: AttentionInputs, state: ScoredState, budget: int) -> Tensor:
        return self.inner.ranking(inputs, state, budget)

    def layer_budget(self, inputs: AttentionInputs) -> int:
        return self.inner.layer_budget(inputs)

    def choose(self, inputs: AttentionInputs, ranking: Tensor, budget: int) -> KVSelection | None:
        return self.inner.choose(inputs, ranking, budget)
