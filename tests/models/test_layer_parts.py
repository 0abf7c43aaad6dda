"""What the bridge hands out of a layer, in every family: its own rotation, turned both ways, and its output weight."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

from loopserve.core.policy.interfaces import AttentionInputs, PrefillSparsifier
from loopserve.core.policy.layers import Need
from loopserve.core.policy.patterns import AttentionPattern, DensePattern
from loopserve.core.stack.stack import PolicyStack
from loopserve.models.bridge import TransformersModel
from loopserve.models.layer_parts import attention_modules
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


# Families without rotated positions, with a rotation of their own, or whose heads are rotated in part by a layer of their own.
WITHOUT_ROTARY = (
    *("gemma3n_text", "gemma4_text", "llama4_text", "deepseek_v2", "deepseek_v3", "glm4_moe_lite", "kimi_linear"),
    *("nemotron_h", "granitemoehybrid", "jamba", "gpt2", "opt"),
)


@pytest.mark.parametrize("family", WITHOUT_ROTARY)
def test_a_family_without_a_rotation_that_can_be_turned_back_says_so(family: str) -> None:
    layer = next(each for each in TransformersModel(tiny_model(family)).layers if each.holds_pairs)
    reason = layer.lacks(Need.ROTARY)
    assert reason is not None
    assert "Attention" in reason  # names the module


@pytest.mark.parametrize(
    "family", [family for family in FAMILIES if family not in ("mistral_window", *WITHOUT_ROTARY)]
)  # all layers of mistral_window slide
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


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "gpt2"])  # its weights are transposed
def test_the_output_weight_maps_heads_into_the_model(family: str) -> None:
    model = tiny_model(family)
    layer = [each for each in TransformersModel(model).layers if each.holds_pairs][-1]
    assert layer.parts is not None and layer.lacks(Need.OUTPUT_WEIGHT) is None
    width = layer.pair_width - layer.head_dim
    heads = torch.randn(layer.query_heads, width, generator=torch.Generator().manual_seed(0))
    module: Any = attention_modules(model)[layer.index]
    output = next(getattr(module, name) for name in ("o_proj", "out_proj", "dense") if hasattr(module, name))
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
