"""Policies inside policies: what a stack file may say of them, and what a wrapper takes from what it wraps."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest

from loopserve.core.errors import ConfigError
from loopserve.core.kv.selection import Retention
from loopserve.core.policy.base import Capabilities
from loopserve.core.policy.interfaces import DecodeCompressor
from loopserve.core.policy.layers import LayerSpec, LayerType, Need
from loopserve.core.policy.registry import Registry
from loopserve.core.policy.wrappers import MAX_NESTING, ScoredWrapper
from loopserve.core.stack.config import InvalidDocument, parse_yaml, to_yaml
from loopserve.core.stack.stack import PolicyStack, pair_refusals, resolve_stack
from loopserve.core.stack.stack_file import read_stack, stack_schema
from loopserve.policies import loopserve_register_policies
from loopserve.policies.decode.adakv import AdaKVDecode
from loopserve.policies.decode.knorm import KnormDecode
from loopserve.policies.decode.snapkv import SnapKVDecode
from loopserve.policies.prefill.dense import DensePrefill
from loopserve.testing.inputs import PlainParts

SNAP = {"policy": "snapkv", "budget": 64, "window": 16, "retention": "evict"}


@pytest.fixture(scope="module")
def registry() -> Registry:
    found = Registry()
    loopserve_register_policies(found)
    return found


def loaded(registry: Registry, decode: dict[str, Any], prefill: str = "dense") -> PolicyStack:
    return resolve_stack({"prefill": {"policy": prefill}, "decode": decode}, registry)


def complaint(registry: Registry, decode: str) -> str:
    with pytest.raises(InvalidDocument) as error:
        read_stack(parse_yaml(f"prefill: {{policy: dense}}\ndecode:\n  {decode}\n", "my.yaml"), registry)
    return str(error.value)


def nested(levels: int) -> dict[str, Any]:
    decode: dict[str, Any] = SNAP
    for _ in range(levels):
        decode = {"policy": "pyramidkv", "inner": decode}
    return decode


def test_a_wrapper_takes_limits_and_abilities_from_what_it_wraps(registry: Registry) -> None:
    stack = loaded(registry, {"policy": "adakv", "inner": {"policy": "criticalkv", "inner": SNAP}})
    outer = stack.decode
    assert isinstance(outer, AdaKVDecode)
    assert isinstance(outer.inner.limits, SnapKVDecode.Config)
    assert (outer.limits.budget, outer.retention) == (64, Retention.EVICT)
    assert outer.effective_capabilities.needs == {Need.OUTPUT_WEIGHT} and AdaKVDecode.capabilities.needs == frozenset()


@pytest.mark.parametrize("levels", [1, 2, MAX_NESTING])
def test_nested_policies_survive_the_way_through_a_file(registry: Registry, levels: int) -> None:
    stack = loaded(registry, nested(levels))
    again = read_stack(parse_yaml(to_yaml(stack.describe()), "again.yaml"), registry)
    assert resolve_stack(stack.describe(), registry) == stack
    assert again.decode.config.model_dump(mode="json") == stack.decode.config.model_dump(mode="json")
    assert stack.digest != loaded(registry, nested(levels - 1)).digest


def test_policies_can_be_nested_in_python() -> None:
    inner = SnapKVDecode(SnapKVDecode.Config(budget=64))
    assert AdaKVDecode(AdaKVDecode.Config(inner=inner)).inner is inner
    with pytest.raises(ValueError, match="give the policy object itself"):
        AdaKVDecode.Config.model_validate({"inner": {"policy": "snapkv"}})


@pytest.mark.parametrize(
    ("decode", "says"),
    [
        (
            "policy: adakv",
            "my.yaml:2: decode.inner: this policy wraps another one, which is missing: name it, such as {policy: snapkv}",
        ),
        ("policy: adakv\n  inner: snapkv", "my.yaml:4: decode.inner: must name a policy, such as {policy: "),
        ("policy: adakv\n  inner: {budget: 3}", "my.yaml:4: decode.inner: must name a policy"),
        ("policy: adakv\n  inner: {policy: snapk}", "decode.inner.policy: unknown decode policy 'snapk'; did you mean"),
        ("policy: adakv\n  inner: {policy: a_shape}", "'a_shape'; it is a prefill policy"),
        (
            "policy: adakv\n  inner: {policy: quest}",
            "decode.inner.policy: decode policy 'quest' gives no score per pair, so it cannot be wrapped",
        ),
        ("policy: adakv\n  inner:\n    policy: snapkv\n    budget: -3", "my.yaml:6: decode.inner.budget: Input should"),
        (
            "policy: adakv\n  inner:\n    policy: snapkv\n    windw: 3",
            "my.yaml:6: decode.inner.windw: unknown key; did you mean 'window'?",
        ),
        ("policy: adakv\n  safegard: 3\n  inner: {policy: snapkv}", "safegard: unknown key; did you mean 'safeguard'?"),
        (
            "policy: criticalkv\n  inner: {policy: chunkkv, inner: {policy: knorm}}",
            "criticalkv multiplies scores, and those of inner policy 'chunkkv' can be negative",
        ),
        (
            "&a\n  policy: adakv\n  inner: *a",
            "my.yaml:5: decode.inner: refers to itself: an alias may not stand inside what it names",
        ),
    ],
)
def test_what_may_not_be_nested(registry: Registry, decode: str, says: str) -> None:
    assert says in complaint(registry, decode)


def test_nesting_has_an_end(registry: Registry) -> None:
    with pytest.raises(ConfigError, match=f"policies are nested deeper than {MAX_NESTING} levels"):
        loaded(registry, nested(MAX_NESTING + 1))
    endless: dict[str, Any] = {"policy": "adakv"}
    endless["inner"] = endless
    with pytest.raises(ConfigError, match="no plain data"):
        loaded(registry, endless)


def test_the_schema_names_what_can_be_inside(registry: Registry) -> None:
    found = str(stack_schema(registry))
    assert "'inner'" in found and "decode_adakv" in found


# Needs


class Wanting(DecodeCompressor[None]):
    """Wants what it says."""

    name: ClassVar[str] = "wanting"
    paper: ClassVar[str] = ""
    capabilities: ClassVar[Capabilities] = Capabilities(needs=frozenset({Need.ROTARY}))

    def init_state(self) -> None:
        return None


class NoRotation(PlainParts):
    def lacks(self, need: Need) -> str | None:
        return "it turns in its own way" if need is Need.ROTARY else None


def specs(parts: PlainParts | None) -> list[LayerSpec]:
    return [LayerSpec(index, LayerType.FULL, 4, 2, 8, parts=parts) for index in range(3)]


def refused(stack: PolicyStack, layers: list[LayerSpec]) -> str:
    with pytest.raises(ConfigError) as error:
        stack.check(layers)
    return str(error.value)


def test_a_need_that_cannot_be_met_is_refused_with_the_reason() -> None:
    stack = PolicyStack("x", DensePrefill(), Wanting())
    stack.check(specs(PlainParts(4, 8)))
    assert refused(stack, specs(NoRotation(4, 8))) == (
        "stack 'x': at layers 0-2, decode policy 'wanting' needs the layer's rotary: it turns in its own way"
    )
    assert "this model's bridge does not supply it" in refused(stack, specs(None))


def test_a_need_inside_a_wrapper_counts(registry: Registry) -> None:
    stack = loaded(registry, {"policy": "adakv", "inner": {"policy": "expected_attention"}})
    assert "decode policy 'adakv' needs the layer's rotary" in refused(stack, specs(NoRotation(4, 8)))


def test_a_pair_that_cannot_work_is_refused_with_the_remedy(registry: Registry) -> None:
    keeping = loaded(registry, SNAP | {"retention": "keep"}, "static_lines")
    evicting = loaded(registry, SNAP, "static_lines")
    keeping.check(specs(None))
    (reason,) = pair_refusals(evicting.prefill, evicting.decode)
    assert (
        "needs every pair of the conversation, and decode policy 'snapkv' evicts: set its retention to keep" in reason
    )
    assert reason in refused(evicting, specs(None))


def test_a_wrapper_that_changes_nothing_chooses_as_what_it_wraps() -> None:
    class Nothing(ScoredWrapper):
        """Changes nothing."""

        name: ClassVar[str] = "nothing"
        paper: ClassVar[str] = ""

    from loopserve.testing.inputs import make_inputs

    inputs, inner = make_inputs(new_tokens=30, total_tokens=60), KnormDecode(KnormDecode.Config(budget=40))
    found = []
    for policy in (inner, Nothing(Nothing.Config(inner=inner))):
        state = policy.init_state()
        policy.after_attention(inputs, state)
        found.append(state.pending[0].indices.tolist())
    assert found[0] == found[1]
