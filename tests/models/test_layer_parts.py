"""What the bridge hands out of a layer, in every family: its own rotation, turned both ways, and its output weight."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

from loopserve.core.policy.interfaces import AttentionInputs, Need, PrefillSparsifier
from loopserve.core.policy.patterns import AttentionPattern, DensePattern
from loopserve.core.stack.stack import PolicyStack
from loopserve.models.bridge import TransformersModel
from loopserve.models.tiny import FAMILIES, tiny_model
from loopserve.policies.decode.full import FullDecode
from tests.models.conftest import engine_for


class Watching(PrefillSparsifier):
    """Keeps what it is shown."""

    name: ClassVar[str] = "watching"
    paper: ClassVar[str] = ""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[int, AttentionInputs] = {}

    def sparsify(self, inputs: AttentionInputs) -> AttentionPattern:
        self.seen[inputs.layer.index] = inputs
        return DensePattern(inputs.queries.shape[0], inputs.new_tokens, inputs.total_tokens)


def shown(family: str, tokens: list[int]) -> dict[int, AttentionInputs]:
    watching = Watching()
    served = engine_for(tiny_model(family), PolicyStack("watch", watching, FullDecode()))
    session = served.session()
    served.prefill(session, tokens)
    return watching.seen


@pytest.mark.parametrize(
    "family", [family for family in FAMILIES if family != "mistral_window"]
)  # all its layers slide
def test_queries_of_one_token_are_alike_once_turned_back(family: str) -> None:
    """In the first layer a query depends on token and place only; without its place nothing is left to differ."""
    found = shown(family, [7] * 23)
    first = found[min(found)]
    assert first.layer.parts is not None and first.layer.lacks(Need.ROTARY) is None
    back = first.layer.parts.rotate(first.queries, first.head_positions(0), back=True)
    if first.layer.index == 0:
        assert not torch.allclose(first.queries[:, :1], first.queries, atol=1e-2)
        assert torch.allclose(back[:, :1].expand_as(back), back, atol=2e-4)
    assert torch.allclose(first.layer.parts.rotate(back, first.head_positions(0)), first.queries, atol=2e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_output_weight_maps_heads_into_the_model(family: str) -> None:
    model = tiny_model(family)
    layer = TransformersModel(model).layers[1]
    assert layer.parts is not None and layer.lacks(Need.OUTPUT_WEIGHT) is None
    heads = torch.randn(layer.query_heads, layer.head_dim, generator=torch.Generator().manual_seed(0))
    output = model.model.layers[1].self_attn.o_proj
    wanted = output(heads.flatten()) - (output.bias if output.bias is not None else 0)
    found = torch.einsum("hd,hde->e", heads, layer.parts.output_weight())
    assert torch.allclose(found, wanted, atol=1e-4)


def refusal(change: Any, need: Need) -> str | None:
    model = tiny_model("llama")
    change(model)
    return TransformersModel(model).layers[0].lacks(need)


def test_what_cannot_be_had_is_refused_with_the_reason() -> None:
    def dynamic(model: Any) -> None:
        model.model.rotary_emb.rope_type = "dynamic"

    def without(model: Any) -> None:
        del model.model.rotary_emb

    def failing(model: Any) -> None:
        model.model.rotary_emb.forward = SimpleNamespace(__call__=None)

    def quantised(model: Any) -> None:
        layer = model.model.layers[0].self_attn
        layer.o_proj = torch.nn.Identity()

    assert "depends on the length of the conversation" in str(refusal(dynamic, Need.ROTARY))
    assert "does not rotate by a rotary_emb" in str(refusal(without, Need.ROTARY))
    assert "cannot be called by itself" in str(refusal(failing, Need.ROTARY))
    assert "has no plain linear o_proj" in str(refusal(quantised, Need.OUTPUT_WEIGHT))
    assert refusal(lambda _: None, Need.ROTARY) is None


def test_a_stack_whose_needs_a_family_cannot_meet_is_refused_at_load() -> None:
    from loopserve.core.errors import ConfigError

    model = tiny_model("llama")
    model.model.rotary_emb.rope_type = "longrope"
    stack = {"prefill": {"policy": "dense"}, "decode": {"policy": "expected_attention"}}
    with pytest.raises(
        ConfigError, match=r"at layers 0-2, decode policy 'expected_attention' needs the layer's rotary"
    ):
        engine_for(model, stack)
