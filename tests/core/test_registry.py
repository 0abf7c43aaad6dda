from typing import Any, ClassVar

import pytest
from pydantic import BaseModel, ConfigDict, Field

from loopserve.core.errors import ConfigError, PluginError
from loopserve.core.policy.base import PolicyConfig
from loopserve.core.policy.interfaces import DecodeCompressor, PrefillSparsifier
from loopserve.core.policy.registry import Kind, Owner, Registry
from tests.core.fake_policies import ALL, AShape, Dense, Full, Snap, fake_registry


def variant(base: type, **attributes: Any) -> type:
    """A policy class that differs from ``base`` in some attributes; '__doc__' and 'paper' count as its own."""
    own = {"__doc__": "A variant.", "name": "variant", "paper": "", **attributes}
    return type("Variant", (base,), own)


def test_kind_follows_from_the_base_class_and_listing_is_ordered():
    listed = [(each.kind, each.name) for each in fake_registry()]
    assert listed == [
        ("prefill", "a_shape"),
        ("prefill", "dense"),
        ("prefill", "sliding_only"),
        ("decode", "evicting"),
        ("decode", "full"),
        ("decode", "snap"),
    ]
    assert len(fake_registry()) == len(ALL)


def test_a_registration_tells_what_a_listing_needs():
    registry = Registry()
    with registry.owned_by(Owner("loopserve-x", "1.2")):
        registry.register(AShape)
    found = registry.get(Kind.PREFILL, "a_shape")
    assert found.summary == "Sinks and a window."
    assert str(found.owner) == "loopserve-x 1.2"
    assert found.paper.startswith("https://")
    assert found.config is AShape.Config
    assert found.capabilities is AShape.capabilities


@pytest.mark.parametrize(
    ("policy", "complaint"),
    [
        (variant(Dense, name="AShape"), "lower-case words"),
        (variant(Dense, name="a-shape"), "lower-case words"),
        (variant(Dense, name="a__b"), "lower-case words"),
        (variant(Dense, name=""), "lower-case words"),
        (variant(Dense, name=None), "lower-case words"),
        (type("NoPaper", (Dense,), {"name": "x", "__doc__": "Doc."}), "must declare its own paper"),
        (variant(Dense, paper=None), "must declare its own paper"),
        (type("NoDoc", (Dense,), {"name": "x", "paper": ""}), "needs a docstring"),
        (variant(Dense, __doc__="  "), "needs a docstring"),
        (variant(Dense, capabilities={"batched": True}), "capabilities must be"),
        (variant(PrefillSparsifier), "does not implement sparsify"),
        (variant(DecodeCompressor), "does not implement init_state"),
        (variant(Dense, Config=dict), "must derive from PolicyConfig"),
        (variant(Dense, Config=type("Config", (BaseModel,), {})), "must derive from PolicyConfig"),
        (int, "must derive from either"),
        (type("Both", (Dense, Full), {}), "must derive from either"),
        (Dense(), "takes a policy class"),
        ("dense", "takes a policy class"),
    ],
)
def test_a_class_that_breaks_the_contract_s_form_is_refused(policy: Any, complaint: str):
    registry = Registry()
    with pytest.raises(PluginError, match=complaint):
        registry.register(policy)
    assert len(registry) == 0


def test_options_must_be_described_frozen_and_closed():
    class Silent(PolicyConfig):
        budget: int = 3

    class Shadow(PolicyConfig):
        policy: str = Field("x", description="Clashes with the key that names the policy.")

    class Open(PolicyConfig):
        model_config = ConfigDict(extra="allow")

    for config, complaint in ((Silent, "'budget' needs a description"), (Shadow, "'policy'"), (Open, "forbid")):
        with pytest.raises(PluginError, match=complaint):
            Registry().register(variant(Dense, Config=config))


def test_a_duplicate_name_is_refused_naming_both_owners():
    registry = Registry()
    with registry.owned_by(Owner("loopserve", "0.1.0")):
        registry.register(Snap)
    with (
        pytest.raises(PluginError, match=r"'snap' of loopserve-rival 2\.0 .*loopserve 0\.1\.0 .*Snap"),
        registry.owned_by(Owner("loopserve-rival", "2.0")),
    ):
        registry.register(variant(Full, name="snap"))
    assert registry.get(Kind.DECODE, "snap").policy is Snap


def test_one_name_may_stand_in_both_kinds():
    registry = Registry()
    registry.register(variant(Dense, name="loop"))
    registry.register(variant(Full, name="loop"))
    assert [each.kind for each in registry.named("loop")] == [Kind.PREFILL, Kind.DECODE]


def test_a_failing_owner_leaves_nothing_behind():
    registry = Registry()
    registry.register(Dense)
    with pytest.raises(PluginError), registry.owned_by(Owner("half", "1")):  # noqa: PT012  # the block is the subject
        registry.register(AShape)
        registry.register(Dense)
    assert registry.names(Kind.PREFILL) == ["dense"]
    registry.register(AShape)
    assert registry.get(Kind.PREFILL, "a_shape").owner.distribution != "half"


def test_an_unknown_name_gets_a_suggestion_and_the_known_names():
    registry = fake_registry()
    with pytest.raises(ConfigError) as error:
        registry.get(Kind.PREFILL, "a_shap")
    assert str(error.value) == (
        "unknown prefill policy 'a_shap'; did you mean 'a_shape'? (known: a_shape, dense, sliding_only)"
    )
    with pytest.raises(ConfigError, match="'snap'; it is a decode policy"):
        registry.get(Kind.PREFILL, "snap")
    with pytest.raises(ConfigError, match="unknown policy 'ful'; did you mean 'full'"):
        registry.named("ful")


class Undocumented(PrefillSparsifier):
    name: ClassVar[str] = "undocumented"
    paper: ClassVar[str] = ""

    def sparsify(self, inputs: Any) -> Any: ...


def test_an_inherited_docstring_does_not_count():
    with pytest.raises(PluginError, match="needs a docstring"):
        Registry().register(Undocumented)
