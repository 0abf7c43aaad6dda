"""A policy that fails before there is a conversation: the stack is refused, naming the policy and who brings it."""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar

import pytest
from pydantic import field_validator

from loopserve.api import load_stack
from loopserve.core.engine.engine import TokenEngine
from loopserve.core.errors import ConfigError, PolicyFault
from loopserve.core.policy.base import Capabilities, PolicyConfig
from loopserve.core.policy.interfaces import AttentionInputs, PrefillSparsifier
from loopserve.core.policy.registry import Owner, Registry
from loopserve.core.stack.stack import resolve_stack
from tests.core.fake_policies import Full, Snap, fake_registry
from tests.core.fault_matrix import model


class BadConstructor(Full):
    """Cannot be made."""

    name: ClassVar[str] = "bad"
    paper: ClassVar[str] = ""

    def __init__(self, config: Any = None) -> None:
        raise ValueError("no\n  luck")


class BadOptions(PrefillSparsifier):
    """Options that cannot be checked."""

    name: ClassVar[str] = "bad"
    paper: ClassVar[str] = ""

    class Config(PolicyConfig):
        """No options."""

        @field_validator("*", mode="before")
        @classmethod
        def _never(cls, value: Any) -> Any:
            return value

        def model_post_init(self, _: Any) -> None:
            raise KeyError("size")

    def sparsify(self, inputs: AttentionInputs) -> Any: ...


class BadDeclaration(Full):
    """Does not know what it can do."""

    name: ClassVar[str] = "bad"
    paper: ClassVar[str] = ""

    @property
    def effective_capabilities(self) -> Capabilities:
        raise ZeroDivisionError("by zero")


class BadRetention(Snap):
    """Does not know what becomes of the rest."""

    name: ClassVar[str] = "bad"
    paper: ClassVar[str] = ""

    @property
    def most_pairs(self) -> int | None:
        raise ZeroDivisionError("by zero")


def registry_with(policy: Any) -> Registry:
    registry = fake_registry()
    with registry.owned_by(Owner("their-plugin", "1.2")):
        registry.register(policy)
    return registry


@pytest.mark.parametrize(
    ("policy", "kind", "raised"),
    [
        (BadConstructor, "decode", r"its constructor: it raised ValueError: no luck;"),
        (BadOptions, "prefill", r"its constructor: it raised KeyError: 'size';"),
        (BadDeclaration, "decode", r"its declaration: it raised ZeroDivisionError: by zero;"),
        (BadRetention, "decode", r"its declaration: it raised ZeroDivisionError: by zero;"),
    ],
)
def test_a_stack_with_a_policy_that_fails_at_load_is_refused(policy: Any, kind: str, raised: str) -> None:
    written = {"prefill": {"policy": "dense"}, "decode": {"policy": "full"}} | {kind: {"policy": "bad"}}
    with pytest.raises(PolicyFault, match=rf"{kind} policy 'bad' \(their-plugin 1\.2\), {raised}") as found:
        TokenEngine(model(), resolve_stack(written, registry_with(policy)), on_policy_fault="dense")
    assert (found.value.policy, found.value.distribution) == ("bad", "their-plugin 1.2")


@pytest.mark.parametrize("kind", ["prefill", "decode"])
def test_a_plugin_that_raises_at_import_is_named_where_its_policy_is_missed(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "raising_plugin.py").write_text("raise ValueError('no luck')")
    monkeypatch.syspath_prepend(str(tmp_path))
    entry = metadata.EntryPoint("theirs", "raising_plugin", "loopserve")
    monkeypatch.setattr(metadata, "entry_points", lambda **_: metadata.EntryPoints([entry]))
    written = {"prefill": {"policy": "dense"}, "decode": {"policy": "full"}}
    with pytest.raises(
        ConfigError, match=rf"unknown {kind} policy 'theirs'(.|\n)*plugin 'theirs'.* ValueError: no luck"
    ):
        load_stack(written | {kind: {"policy": "theirs"}})
    assert load_stack(written).is_dense, "every other stack is served"
    assert "raising_plugin" not in sys.modules
