"""What a stack refuses before any token is computed."""

from typing import Any

import pytest

from loopserve.core.errors import ConfigError
from loopserve.core.kv.selection import Retention
from loopserve.core.policy.layers import LayerSpec, LayerType
from loopserve.core.stack.stack import Override, PolicyStack, resolve_stack
from loopserve.core.stack.stack_file import LayerRange
from tests.core.fake_policies import Dense, Evicting, Full, SlidingOnly, Snap, fake_registry

MINIMAL = {"prefill": {"policy": "dense"}, "decode": {"policy": "full"}}


def layers(*types: str) -> list[LayerSpec]:
    """``layers("ffs")``: two full-attention layers and a sliding one."""
    kinds = {"f": LayerType.FULL, "s": LayerType.SLIDING}
    return [LayerSpec(index, kinds[each], 4, 2, 8) for index, each in enumerate("".join(types))]


def refused(stack: PolicyStack, specs: list[LayerSpec], **options: Any) -> str:
    with pytest.raises(ConfigError) as error:
        stack.check(specs, **options)
    return str(error.value)


def test_a_stack_that_fits_is_accepted():
    stack = resolve_stack({"prefill": {"policy": "a_shape"}, "decode": {"policy": "snap"}}, fake_registry())
    stack.check(layers("ffff"))
    stack.check(layers("sfsf"), batch=True)


def test_a_model_without_full_attention_is_refused_unless_dense():
    stack = resolve_stack({"prefill": {"policy": "a_shape"}, "decode": {"policy": "full"}}, fake_registry())
    for specs in ([], layers("ss")):
        assert "no full-attention layer" in refused(stack, specs)
        assert "'dense'" in refused(stack, specs)
        resolve_stack(MINIMAL, fake_registry()).check(specs)


def test_an_override_on_a_layer_that_no_policy_serves_is_refused():
    spec = MINIMAL | {"name": "x", "layers": [{"at": "0-1", "prefill": {"policy": "a_shape"}}]}
    assert refused(resolve_stack(spec, fake_registry()), layers("fsf")) == (
        "stack 'x': layers[0].at: layer 1 is a sliding_attention layer, which stays as the model has it: "
        "take it out of 'at'"
    )


@pytest.mark.parametrize("at", [[4], ["2-4"], [-5], ["0--5"]])
def test_an_override_on_layers_that_are_not_there_is_refused(at: list[Any]):
    spec = MINIMAL | {"layers": [{"at": at, "prefill": {"policy": "a_shape"}}]}
    assert "does not fit the model, which has layers 0 to 3" in refused(
        resolve_stack(spec, fake_registry()), layers("ffff")
    )


def test_what_a_policy_cannot_do_is_refused_naming_policy_layers_and_remedy():
    stack = PolicyStack("x", SlidingOnly(), Snap(Snap.Config(retention=Retention.EVICT)))
    assert refused(stack, layers("fsff")).splitlines() == [
        "stack 'x': prefill policy 'sliding_only' at layers 0, 2-3 serves only sliding_attention layers: "
        "choose another policy there",
        "stack 'x': decode policy 'snap' at layers 0, 2-3 cannot evict pairs: set retention: keep",
    ]


def test_a_batch_needs_policies_that_serve_one():
    stack = PolicyStack("x", Dense(), Full(), (Override((LayerRange(1, 1),), decode=Evicting()),))
    stack.check(layers("ff"))
    message = refused(stack, layers("ff"), batch=True)
    assert message.startswith("stack 'x': decode policy 'evicting' at layer 1 cannot serve a batch: ")
