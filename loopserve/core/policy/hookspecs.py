"""Declare the hook through which every policy is registered, the built-in ones too.

A plugin is a module with a function of this name and signature, marked with ``hookimpl``, and an entry point in the
group ``loopserve`` that names the module::

    from loopserve import hookimpl

    LOOPSERVE_API = (1, 0)  # what this is written for (``core.policy.api_version``); another major version is refused by name

    @hookimpl
    def loopserve_register_policies(registry):
        registry.register(MyCompressor)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from loopserve.core.policy.registry import Registry

PROJECT = "loopserve"  # pluggy's project name: the prefix of every hook, and the entry-point group

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def loopserve_register_policies(registry: Registry) -> None:
    """Register each policy class with ``registry.register(policy_class)``. Called once at start."""
