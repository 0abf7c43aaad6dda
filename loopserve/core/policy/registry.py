"""Keep the registered policies by kind and name, with the distribution of each. Refuse a class whose form is wrong.

Depends on no concrete policy and discovers none: ``loopserve.plugins`` lets plugins register here.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from loopserve.core.errors import ConfigError, PluginError, did_you_mean
from loopserve.core.policy.base import Capabilities, PolicyConfig, require_api
from loopserve.core.policy.interfaces import DecodeCompressor, PrefillSparsifier

PolicyClass = type[PrefillSparsifier] | type[DecodeCompressor[Any]]

_NAME = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*")
_POLICY_KEY = "policy"  # the key that names the policy in a stack file, so no option may be called that


class Kind(StrEnum):
    """Name the two policies of a layer: prefill and decode."""

    PREFILL = "prefill"
    DECODE = "decode"


_BASES: dict[Kind, type] = {Kind.PREFILL: PrefillSparsifier, Kind.DECODE: DecodeCompressor}


@dataclass(frozen=True)
class Owner:
    """Name the distribution of a policy."""

    distribution: str
    version: str

    def __str__(self) -> str:
        return f"{self.distribution} {self.version}".strip()


_UNOWNED = Owner("this program", "")  # registered by hand, outside any plugin


@dataclass(frozen=True)
class Registration:
    """Hold one registered policy."""

    kind: Kind
    policy: PolicyClass
    owner: Owner

    @property
    def name(self) -> str:
        return self.policy.name

    @property
    def paper(self) -> str:
        """Return the link to the paper; empty where there is none."""
        return self.policy.paper

    @property
    def capabilities(self) -> Capabilities:
        return self.policy.capabilities

    @property
    def config(self) -> type[PolicyConfig]:
        """Return the model of its options."""
        return self.policy.Config

    @property
    def summary(self) -> str:
        """Return the first paragraph of the docstring on one line."""
        return " ".join((inspect.getdoc(self.policy) or "").split("\n\n")[0].split())


class Registry:
    """Hold policies by kind and name. A method with a prefill and a decode policy may use one name for both."""

    def __init__(self) -> None:
        self._found: dict[tuple[Kind, str], Registration] = {}
        self._owner = _UNOWNED

    def register(self, policy: PolicyClass) -> None:
        """Add a policy class; its base class gives its kind. Raises PluginError if its form is wrong or its name is taken."""
        kind = _kind_of(policy)
        _check_form(policy)
        taken = self._found.get((kind, policy.name))
        if taken is not None:
            raise PluginError(
                f"{kind} policy {policy.name!r} of {self._owner} ({_path(policy)}) has a name that {taken.owner} "
                f"({_path(taken.policy)}) has taken: choose another"
            )
        self._found[kind, policy.name] = Registration(kind, policy, self._owner)

    @contextmanager
    def owned_by(self, owner: Owner) -> Iterator[None]:
        """Give registrations in this block to ``owner``; an exception removes all of them."""
        before, previous = dict(self._found), self._owner
        self._owner = owner
        try:
            yield
        except BaseException:
            self._found = before
            raise
        finally:
            self._owner = previous

    def get(self, kind: Kind, name: str) -> Registration:
        """Return a policy. Raises ConfigError with a suggestion if there is no such policy."""
        registration = self._found.get((kind, name))
        if registration is None:
            elsewhere = "".join(f"; it is a {other} policy" for other in Kind if (other, name) in self._found)
            raise ConfigError(f"unknown {kind} policy {name!r}{elsewhere}{did_you_mean(name, self.names(kind))}")
        return registration

    def names(self, kind: Kind) -> list[str]:
        return sorted(name for each, name in self._found if each is kind)

    def named(self, name: str) -> list[Registration]:
        """Return every policy of one name, of either kind. Raises ConfigError with a suggestion if there is none."""
        registrations = [each for each in self if each.name == name]
        if not registrations:
            raise ConfigError(f"unknown policy {name!r}{did_you_mean(name, {each.name for each in self})}")
        return registrations

    def __iter__(self) -> Iterator[Registration]:
        """Yield prefill policies first, then decode policies, each by name."""
        return iter([self._found[key] for kind in Kind for key in sorted(self._found) if key[0] is kind])

    def __len__(self) -> int:
        return len(self._found)


def is_policy_name(name: str) -> bool:
    """Return whether a name is lower-case words of letters and digits joined by '_', the first beginning with a letter."""
    return _NAME.fullmatch(name) is not None


def _accepted(name: object) -> str:
    """Return ``; write 'my_policy'`` where a name is close to an accepted one."""
    near = re.sub(r"[^a-z0-9]+", "_", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", str(name)).lower()).strip("_")
    return f"; write {near!r}" if isinstance(name, str) and is_policy_name(near) else ""


def _path(policy: type) -> str:
    return f"{policy.__module__}.{policy.__qualname__}"


def _kind_of(policy: object) -> Kind:
    if not inspect.isclass(policy):
        raise PluginError(f"register takes a policy class, got {policy!r}")
    kinds = [kind for kind, base in _BASES.items() if issubclass(policy, base)]
    if len(kinds) != 1:
        raise PluginError(f"{_path(policy)}: must derive from either PrefillSparsifier or DecodeCompressor")
    return kinds[0]


def _check_form(policy: PolicyClass) -> None:
    where = _path(policy)
    require_api(policy.api_version, where)
    name = getattr(policy, "name", None)
    if not isinstance(name, str) or not is_policy_name(name):
        raise PluginError(f"{where}: name must be lower-case words joined by '_', got {name!r}{_accepted(name)}")
    missing = sorted(getattr(policy, "__abstractmethods__", ()))
    if missing:
        raise PluginError(f"{where}: does not implement {', '.join(missing)}")
    # Looked up in the class itself: an inherited paper or docstring would describe the parent.
    if not isinstance(policy.__dict__.get("paper"), str):
        raise PluginError(f"{where}: must declare its own paper (a link; '' only for what has no paper)")
    if not (policy.__dict__.get("__doc__") or "").strip():
        raise PluginError(f"{where}: needs a docstring; its first paragraph is shown by `loopserve policies`")
    if not isinstance(policy.capabilities, Capabilities):
        raise PluginError(f"{where}: capabilities must be a Capabilities, got {policy.capabilities!r}")
    _check_config(policy, where)


def _check_config(policy: PolicyClass, where: str) -> None:
    config = policy.Config
    if not (inspect.isclass(config) and issubclass(config, PolicyConfig)):
        raise PluginError(f"{where}: Config must derive from PolicyConfig, got {config!r}")
    if not config.model_config.get("frozen") or config.model_config.get("extra") != "forbid":
        raise PluginError(f"{where}: Config must stay frozen and forbid unknown options")
    for option, declared in config.model_fields.items():
        if option == _POLICY_KEY:
            raise PluginError(f"{where}: an option may not be called {_POLICY_KEY!r}, that key names the policy")
        if not declared.description:
            raise PluginError(f"{where}: option {option!r} needs a description")
