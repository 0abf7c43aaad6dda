"""What the model or the caller brings in another dtype, or as no number, is served or refused: never a policy's fault."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import loopserve
from loopserve.core.errors import CacheError, LoopServeError, ModelError, PolicyFault
from loopserve.core.stack.stack import PolicyStack
from loopserve.policies.decode.full import FullDecode
from tests.core.faulty import Windowed
from tests.faults.models import answer, engine, generated, ids, tiny, tokens

SNAPKV = {"prefill": {"policy": "dense"}, "decode": {"policy": "snapkv", "budget": 16, "window": 4, "sink_tokens": 1}}
STACKS: list[Any] = ["dense", "loopserve", SNAPKV]
IDS = ["dense", "loopserve", "snapkv"]


@pytest.mark.parametrize("stack", STACKS, ids=IDS)
@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "gemma2"])
def test_autocast_is_served(family: str, stack: Any) -> None:
    more = {"hidden_size": 64, "sliding_window": None} if family == "phi3" else {}
    model = tiny(family, **more)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with torch.no_grad():
            plain = model(ids(40)).logits
        with loopserve.apply(model, stack), torch.no_grad():
            found = model(ids(40)).logits
            assert len(generated(model, ids(40), 6)) == 6
    assert found.dtype == plain.dtype
    assert float((found.float() - plain.float()).abs().max()) < 0.15 * float(plain.float().abs().max())


@pytest.mark.parametrize("stack", STACKS, ids=IDS)
def test_autocast_under_an_engine_and_out_of_it(stack: Any) -> None:
    served = engine(tiny(), stack)
    session = served.session()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert len(answer(served, session, tokens(40), 4)) == 4
        assert len(answer(served, session, tokens(10, 1), 4)) == 4
    with pytest.raises(CacheError, match="must go on in the dtype") as raised:
        answer(served, session, tokens(5, 2), 4)
    assert not isinstance(raised.value, PolicyFault)
    assert len(session.turns) == 2


@pytest.mark.parametrize("stack", STACKS, ids=IDS)
def test_a_model_recast_between_turns(stack: Any) -> None:
    model = tiny()
    served = engine(model, stack)
    session = served.session()
    first = answer(served, session, tokens(40), 4)
    model.to(torch.bfloat16)
    with pytest.raises(CacheError, match=r"computes keys in bfloat16.*holds float32 on cpu.*start a new session"):
        answer(served, session, tokens(5), 4)
    assert len(answer(served, served.session(), tokens(40), 4)) == 4
    model.to(torch.float32)
    assert session.tokens == tokens(40) + first
    assert len(answer(served, session, tokens(5), 4)) == 4


def test_a_recast_model_spoils_only_the_sessions_begun_before() -> None:
    model = tiny()
    served = engine(model)
    old = served.session()
    answer(served, old, tokens(30), 3)
    model.to(torch.bfloat16)
    wanted = answer(served, served.session(), tokens(20, 1), 3)
    turns = [
        served.begin(session, prompt, lambda logits: int(logits.argmax()), max_new_tokens=3)
        for session, prompt in ((old, tokens(5)), (served.session(), tokens(20, 1)))
    ]
    while waiting := [turn for turn in turns if not turn.finished]:
        served.run_pass(waiting)
    assert isinstance(turns[0].error, CacheError)
    assert turns[1].error is None and turns[1].output == wanted


class TestNoNumbers:
    """NaN in a weight, NaN in one token only, and infinities."""

    def broken(self, value: float, name: str) -> Any:
        model = tiny()
        with torch.no_grad():
            getattr(model.model.layers[1].self_attn, name).weight[0, 0] = value
        return model

    @pytest.mark.parametrize("name", ["q_proj", "k_proj", "v_proj"])
    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    @pytest.mark.parametrize("stack", ["loopserve", SNAPKV, "expected_attention", "h2o", "quest"], ids=str)
    def test_of_the_model_is_its_own_fault(self, stack: Any, value: float, name: str) -> None:
        served = engine(self.broken(value, name), stack)
        with pytest.raises(LoopServeError) as raised:
            answer(served, served.session(), tokens(60), 12)
        assert not isinstance(raised.value, PolicyFault), raised.value
        assert isinstance(raised.value, ModelError)

    def test_a_policy_that_stumbles_over_it_is_not_blamed(self) -> None:
        def stumbles(_: Any, inputs: Any, pattern: Any, call: int) -> Any:
            if bool(inputs.keys.isnan().any()):
                raise ValueError("cannot convert float NaN to integer")
            return pattern

        from tests.core.faulty import MARKED

        served = engine(self.broken(float("nan"), "k_proj"), PolicyStack("sparse", Windowed(stumbles), FullDecode()))
        with pytest.raises(ModelError, match="keys or values of layer 1 are not finite numbers"):
            answer(served, served.session(), tokens(MARKED), 3)


MLA: dict[str, Any] = {
    "q_lora_rank": None,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
}
MOE: dict[str, Any] = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("deepseek_v2", {**MLA, **MOE}),
        ("deepseek_v3", {**MLA, **MOE, "n_shared_experts": 1, "q_lora_rank": 16}),
        ("minicpm3", {**MLA, "q_lora_rank": 16, "qk_nope_head_dim": 16}),
        ("youtu", {**MLA, "q_lora_rank": 16}),
    ],
)
def test_latent_attention_is_served_on_the_expanded_pairs(family: str, options: dict[str, Any]) -> None:
    model = tiny(family, **{**options, "head_dim": options["qk_rope_head_dim"]})
    plain = generated(model, ids(30), 6)
    with loopserve.apply(model, "dense"):
        assert generated(model, ids(30), 6) == plain
    served = engine(model)
    assert answer(served, served.session(), tokens(30), 6) == plain


def test_latent_attention_with_an_indexer_of_its_own_is_refused_at_load() -> None:
    model = tiny(
        "deepseek_v32", **{**MLA, **MOE, "q_lora_rank": 16, "head_dim": 8, "index_n_heads": 2, "index_head_dim": 16}
    )
    with pytest.raises(ModelError, match="not supported"), loopserve.apply(model, "dense"):
        pass


def test_layers_that_compute_other_heads_than_configured_are_refused() -> None:
    model = tiny()
    model.model.layers[1].self_attn.num_key_value_groups = 4
    served = engine(model)
    with pytest.raises(
        ModelError, match="2 key heads of size 16 and 2 value heads; its configuration says 4 and 1 heads"
    ):
        answer(served, served.session(), tokens(20), 2)


@pytest.mark.parametrize("stack", STACKS, ids=IDS)
def test_values_may_have_another_size_than_keys(stack: Any) -> None:
    options: dict[str, Any] = {
        "hidden_size": 64,
        "v_head_dim": 32,
        "moe_intermediate_size": 32,
        "num_experts_per_tok": 2,
    }
    model = tiny("mimo_v2_flash", **options, num_local_experts=4, n_routed_experts=4, n_group=1, topk_group=1)
    plain = generated(model, ids(40), 6)
    with loopserve.apply(model, stack):
        found = generated(model, ids(40), 6)
    assert found == plain or stack == SNAPKV
