"""Define what both kinds of policy share: declarations, options, and how a state is written to disk."""

from __future__ import annotations

from abc import ABC
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict

from loopserve.core.errors import PluginError, PolicyError
from loopserve.core.kv.selection import Retention
from loopserve.core.policy.layers import LayerSpec, LayerType, Need
from loopserve.core.policy.state import PackedState, pack_state, types_within, unpack_state

ApiVersion = tuple[int, int]

API_VERSION: ApiVersion = (1, 0)
FIRST_API: ApiVersion = (1, 0)  # of a plugin that declares none: declarations came later


class PolicyConfig(BaseModel):
    """Serve as base of every policy's inner ``Config``: frozen, unknown keys refused, each field described."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


@dataclass(frozen=True)
class Capabilities:
    """Declare what a policy can do. A stack that asks for more is refused before any token is computed."""

    layer_types: frozenset[LayerType] = frozenset({LayerType.FULL})
    retentions: frozenset[Retention] = frozenset({Retention.KEEP})
    deterministic: bool = True  # equal inputs and seed give equal choices
    batched: bool = True  # rows of a batch may be served side by side
    passive: bool = False  # leaves every layer as the model has it (dense, full)
    needs: frozenset[Need] = frozenset()  # what it uses beyond queries, keys and values
    observes: bool = False  # may ask for an observation; refused where rows cannot be computed again


class Policy(ABC):
    """Declare a policy's name, options and capabilities. Immutable and shared by all sessions.

    A concrete policy sets ``name`` (snake_case) and ``paper`` (a link; "" where there is none) in its own class, and the
    ``api_version`` that it was written for. Everything that changes is kept in a state, which the session owns.
    """

    api_version: ClassVar[ApiVersion] = FIRST_API
    name: ClassVar[str]
    paper: ClassVar[str]
    capabilities: ClassVar[Capabilities] = Capabilities()
    state_types: ClassVar[tuple[type, ...]] = ()  # types in a state that its annotations do not name

    class Config(PolicyConfig):
        """Take no options."""

    def __init__(self, config: PolicyConfig | None = None) -> None:
        self.config = config if config is not None else self.Config()

    @property
    def effective_capabilities(self) -> Capabilities:
        """Return what this object can do under its options; a wrapper's depends on the policy inside."""
        return self.capabilities

    @property
    def effective_state_types(self) -> tuple[type, ...]:
        """Return ``state_types``; a wrapper adds those of the policy inside."""
        return self.state_types

    def refuses(self, layer: LayerSpec) -> str | None:
        """Return why this policy cannot serve a layer under its options, or None. Called once, when a model is loaded."""
        return None

    def init_state(self) -> Any:
        """Return a fresh state for one session."""
        return {}

    def pack_state(self, state: Any) -> PackedState:
        """Return a state as a JSON-able tree and a list of tensors, all of them copies. Called between two turns.

        Raises PolicyError that names the value which cannot be written. Override it together with ``unpack_state`` for a state that
        contains types which ``core.policy.state`` cannot write.
        """
        return pack_state(state, self._types())

    def unpack_state(self, packed: PackedState, device: torch.device | None = None) -> Any:
        """Return the state that ``pack_state`` wrote, its tensors on ``device`` (None: where they are).

        Raises PolicyError for a state that is damaged, or was written by another policy.
        """
        tree, tensors = packed
        state, wanted = unpack_state(tree, tensors, self._types(), device), type(self.init_state())
        if type(state) is not wanted:
            raise PolicyError(f"its state is a {wanted.__name__}, what was written is a {type(state).__name__}")
        return state

    def _types(self) -> dict[str, type]:
        return types_within(type(self.init_state()), *self.effective_state_types)


def require_api(declared: object, what: str) -> None:
    """Raise PluginError, naming ``what``, unless it was written for this API version or an older minor one."""
    if not (isinstance(declared, tuple) and len(declared) == 2 and all(type(each) is int for each in declared)):
        raise PluginError(f"{what} declares API version {declared!r}: write two numbers, such as {API_VERSION}")
    (major, minor), (own_major, own_minor) = declared, API_VERSION
    if major == own_major and minor <= own_minor:
        return
    newer = (major, minor) > (own_major, own_minor)
    remedy = "update loopserve, or install an older version of it" if newer else "install a newer version of it"
    raise PluginError(
        f"{what} is written for version {major}.{minor} of loopserve's plugin API, this loopserve has "
        f"{own_major}.{own_minor}: {remedy}"
    )
