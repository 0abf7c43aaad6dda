"""Policies that fulfil the contract's form and do nothing, for tests of the registry and of stacks."""

from typing import Any, ClassVar

from pydantic import Field, model_validator

from loopserve.core.kv.selection import Retention
from loopserve.core.policy.base import Capabilities, PolicyConfig
from loopserve.core.policy.interfaces import DecodeCompressor, PrefillSparsifier
from loopserve.core.policy.layers import LayerType
from loopserve.core.policy.registry import Registry


class Dense(PrefillSparsifier):
    """Every cell."""

    name: ClassVar[str] = "dense"
    paper: ClassVar[str] = ""
    capabilities: ClassVar[Capabilities] = Capabilities(passive=True)

    def sparsify(self, inputs: Any) -> Any:
        raise NotImplementedError


class AShape(PrefillSparsifier):
    """Sinks and a
    window.

    More about it.
    """

    name: ClassVar[str] = "a_shape"
    paper: ClassVar[str] = "https://arxiv.org/abs/2309.17453"

    class Config(PolicyConfig):
        """Options."""

        sinks: int = Field(4, ge=0, description="First tokens.")
        alpha: float = Field(0.9, gt=0, le=1, description="Share.")

    def sparsify(self, inputs: Any) -> Any:
        raise NotImplementedError


class SlidingOnly(Dense):
    """Serves nothing a stack could ask for."""

    name: ClassVar[str] = "sliding_only"
    paper: ClassVar[str] = ""
    capabilities: ClassVar[Capabilities] = Capabilities(layer_types=frozenset({LayerType.SLIDING}))


class Full(DecodeCompressor[None]):
    """Every pair."""

    name: ClassVar[str] = "full"
    paper: ClassVar[str] = ""
    capabilities: ClassVar[Capabilities] = Capabilities(passive=True)

    def init_state(self) -> None:
        return None


class Snap(Full):
    """Some pairs."""

    name: ClassVar[str] = "snap"
    capabilities: ClassVar[Capabilities] = Capabilities()
    paper: ClassVar[str] = "https://arxiv.org/abs/2404.14469"

    class Config(PolicyConfig):
        """Options."""

        budget: int = Field(1024, gt=0, description="Pairs.")
        window: int = Field(32, ge=0, description="Last tokens.")
        retention: Retention = Field(Retention.KEEP, description="What becomes of the rest.")
        kernels: tuple[int, ...] = Field((), description="Widths.")

        @model_validator(mode="after")
        def _fits(self) -> "Snap.Config":
            if self.window > self.budget:
                raise ValueError(f"window ({self.window}) exceeds the budget ({self.budget})")
            return self


class Evicting(Snap):
    """Some pairs, and it may let the rest go; alone only."""

    name: ClassVar[str] = "evicting"
    paper: ClassVar[str] = ""
    capabilities: ClassVar[Capabilities] = Capabilities(retentions=frozenset(Retention), batched=False)


ALL = (Dense, AShape, SlidingOnly, Full, Snap, Evicting)


def fake_registry() -> Registry:
    registry = Registry()
    for policy in ALL:
        registry.register(policy)
    return registry
