"""Discover plugins and let each register its policies: the built-in ones first, then those of other distributions.

A plugin is registered as a whole or not at all. One that cannot be loaded, or fails while it registers, is reported with the
reason, leaves no policy behind and never ends the program (unless ``strict`` is set).
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import pluggy

from loopserve.core.errors import PluginError, did_you_mean
from loopserve.core.policy import hookspecs
from loopserve.core.policy.base import FIRST_API, require_api
from loopserve.core.policy.registry import Owner, Registry

BUILT_IN = "loopserve"
DISABLED_VARIABLE = "LOOPSERVE_DISABLED_PLUGINS"
API_ATTRIBUTE = "LOOPSERVE_API"  # of a plugin: the API version that it was written for

_BUILT_IN_MODULE = "loopserve.policies"
_PREFIX = f"{hookspecs.PROJECT}_"
_HOOK = hookspecs.loopserve_register_policies.__name__
_HOOKS = frozenset(name for name in vars(hookspecs) if name.startswith(_PREFIX))


@dataclass(frozen=True)
class LoadedPlugin:
    """Hold a plugin that is in the registry, with all policies that it registered."""

    name: str
    owner: Owner
    policies: tuple[str, ...]


@dataclass(frozen=True)
class PluginProblem:
    """Hold the name of a plugin that was skipped, and the reason."""

    name: str
    owner: Owner | None
    reason: str

    def __str__(self) -> str:
        return f"plugin {self.name!r}{f' ({self.owner})' if self.owner else ''} skipped: {self.reason}"


@dataclass(frozen=True)
class LoadedPlugins:
    """Hold the registry, its plugins and the plugins that were skipped."""

    registry: Registry
    plugins: tuple[LoadedPlugin, ...]
    problems: tuple[PluginProblem, ...]
    disabled: tuple[str, ...]


def load_registry(*, strict: bool = False, disabled: Iterable[str] | None = None) -> LoadedPlugins:
    """Return all policies. strict: raise PluginError for a plugin that cannot be loaded, instead of reporting it.

    disabled: names of plugins that are not imported. The default is the comma-separated LOOPSERVE_DISABLED_PLUGINS.
    """
    blocked = _blocked(disabled)
    registry = Registry()
    built_in = Owner(BUILT_IN, _own_version())
    # Without the built-in policies no preset works, so their failure is always an error.
    loaded = [_admit(registry, BUILT_IN, built_in, importlib.import_module(_BUILT_IN_MODULE))]
    problems = []
    known = [entry.name for entry in _entry_points()]
    for entry in _entry_points():
        if entry.name in blocked:
            continue
        owner = Owner(entry.dist.name, entry.dist.version) if entry.dist is not None else Owner("unknown", "")
        try:
            _refuse_taken(entry.name, owner, loaded)
            loaded.append(_admit(registry, entry.name, owner, entry.load()))
        except (Exception, SystemExit) as error:  # code of somebody else may raise anything
            problem = PluginProblem(entry.name, owner, _reason(error))
            if strict:
                raise PluginError(str(problem)) from error
            problems.append(problem)
    for name in sorted(blocked - set(known)):
        problem = PluginProblem(name, None, f"it is disabled, but there is no such plugin{did_you_mean(name, known)}")
        if strict:
            raise PluginError(str(problem))
        problems.append(problem)
    return LoadedPlugins(registry, tuple(loaded), tuple(problems), tuple(sorted(blocked & set(known))))


def _blocked(disabled: Iterable[str] | None) -> frozenset[str]:
    names = os.environ.get(DISABLED_VARIABLE, "").split(",") if disabled is None else disabled
    return frozenset(name.strip() for name in names if name.strip())


def _own_version() -> str:
    try:
        return metadata.version(BUILT_IN)
    except metadata.PackageNotFoundError:  # run from a checkout that is not installed
        return "(not installed)"


def _entry_points() -> list[metadata.EntryPoint]:
    """Return entry points in a fixed order, so that name conflicts do not depend on the file system."""
    entries = metadata.entry_points(group=hookspecs.PROJECT)
    return sorted(entries, key=lambda entry: (entry.name, entry.dist.name if entry.dist is not None else ""))


def _refuse_taken(name: str, owner: Owner, loaded: Iterable[LoadedPlugin]) -> None:
    for other in loaded:
        if other.name == name:
            raise PluginError(f"the plugin name {name!r} of {owner} is taken by {other.owner}")


def _admit(registry: Registry, name: str, owner: Owner, plugin: Any) -> LoadedPlugin:
    """Check one plugin's hooks and let it register. Its registrations are removed if it fails."""
    before = set(registry)
    # A separate manager: pluggy keeps a plugin with a malformed hook half registered.
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    require_api(getattr(plugin, API_ATTRIBUTE, FIRST_API), "it")
    manager.register(plugin, name)
    _check_hooks(manager, plugin)
    with registry.owned_by(owner):
        manager.hook.loopserve_register_policies(registry=registry)
    policies = (f"{each.kind}.{each.name}" for each in registry if each not in before)
    return LoadedPlugin(name, owner, tuple(policies))


def _check_hooks(manager: pluggy.PluginManager, plugin: Any) -> None:
    """Raise PluginError for a hook that would never be called: misspelt, or not marked."""
    marked = {caller.name for caller in manager.get_hookcallers(plugin) or ()}
    for name in _hook_like(plugin):
        if name not in _HOOKS:
            raise PluginError(f"unknown hook {name!r}{did_you_mean(name, _HOOKS)}")
        if name not in marked:
            raise PluginError(f"{name} is not marked with loopserve.core.policy.hookspecs.hookimpl")
    manager.check_pending()  # marked hooks whose names do not begin with the project's prefix
    if not marked:
        raise PluginError(
            f"it has no hook: define {_HOOK}(registry), marked with loopserve.core.policy.hookspecs.hookimpl"
        )


def _hook_like(plugin: Any) -> Iterator[str]:
    # The type too: the plugin may be an object whose hooks are methods.
    for name in sorted({*vars(type(plugin)), *getattr(plugin, "__dict__", {})}):
        if name.startswith(_PREFIX) and callable(getattr(plugin, name, None)):
            yield name


def _reason(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, PluginError) else f"{type(error).__name__}: {text}".rstrip(": ")
