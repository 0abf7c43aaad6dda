"""Test the adapter with scorers of kvpress's interface: their inputs, the use of their scores, and refusals."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import kvpress_like
import pytest
import torch
from loopserve_kvpress import KVPressDecode, ScorerDecode, loopserve_register_policies
from loopserve_kvpress.stand_in import StandInModule, cos_and_sin
from safetensors.torch import load_file

from loopserve import AttentionInputs, ConfigError, LayerSpec, LayerType, Need, Phase, PolicyError
from loopserve.core.policy.registry import Kind, Registry
from loopserve.core.stack.stack import resolve_stack
from loopserve.policies import loopserve_register_policies as built_in
from loopserve.testing import parametrize_with_policy_checks
from loopserve.testing.inputs import FakeRecord, PlainParts, make_inputs

FROZEN = Path(__file__).parents[3] / "tests/oracle/fixtures/grouped.safetensors"  # scores of kvpress
BARE = {"sink_tokens": 0, "recent_window": 0}


@pytest.fixture(autouse=True)
def kvpress(monkeypatch: pytest.MonkeyPatch) -> None:
    """Provide a package named kvpress with the scorers of this folder."""
    package = ModuleType("kvpress")
    vars(package).update({name: value for name, value in vars(kvpress_like).items() if isinstance(value, type)})
    monkeypatch.setitem(sys.modules, "kvpress", package)


def policy(press: str, budget: int = 24, **fields: Any) -> KVPressDecode:
    options = {name: fields.pop(name) for name in list(fields) if name not in KVPressDecode.Config.model_fields}
    return KVPressDecode(KVPressDecode.Config(press=press, options=options, budget=budget, **{**BARE, **fields}))


def frozen_inputs() -> tuple[AttentionInputs, dict[str, torch.Tensor]]:
    found = load_file(FROZEN)
    heads, tokens, dim = found["queries"].shape
    layer = LayerSpec(1, LayerType.FULL, heads, len(found["keys"]), dim, parts=PlainParts(heads, dim))
    columns = torch.arange(tokens)
    inputs = AttentionInputs(
        found["queries"],
        found["keys"],
        found["values"],
        columns,
        columns,
        None,
        layer,
        Phase.PREFILL,
        turn=0,
        turn_start=0,
        output_index=0,
        final=True,
        scaling=dim**-0.5,
        softcap=None,
        record=FakeRecord(),
    )
    return inputs, found


@pytest.mark.parametrize(
    ("press", "fields", "theirs"),
    [
        ("WindowScorer", {"window_size": 16, "kernel_size": 5}, "snapkv"),
        ("WindowScorer", {"window_size": 8, "kernel_size": 7}, "snapkv_wide"),
        ("KeyLengthScorer", {"reads_queries": False}, "knorm"),
        ("ObservedScorer", {"reads_queries": False, "attentions": True}, "observed_attention"),
    ],
)
def test_a_scorer_gives_what_kvpress_gave_on_a_real_model(press: str, fields: dict[str, Any], theirs: str) -> None:
    inputs, found = frozen_inputs()
    scores, expected = policy(press, **fields).score(inputs), found[f"scores.{theirs}"]
    ranked = expected < expected.max() - 0.5 if press == "WindowScorer" else torch.ones_like(expected, dtype=torch.bool)
    assert float((scores - expected)[ranked].abs().max()) <= 1e-5


def test_a_scorer_that_rotates_to_positions_to_come_gives_what_kvpress_gave() -> None:
    """Compare with kvpress's ExpectedAttention without covariance and value norms, and without sinks."""
    inputs, found = frozen_inputs()
    scores = policy("ExpectedScorer", n_future=64, n_sink=2).score(inputs)[:, 2:]
    assert float((scores - found["scores.expected_attention_mean"][:, 2:]).abs().max()) <= 1e-5


def test_positions_to_come_follow_the_whole_conversation() -> None:
    inputs = make_inputs(new_tokens=8, total_tokens=30, turn=1)
    module = StandInModule(inputs, 2, reads_queries=True)
    found = module.rotary_emb(inputs.queries, torch.arange(8, 12)[None])  # as a scorer that sees 8 queries counts
    assert inputs.layer.parts is not None
    torch.testing.assert_close(found, cos_and_sin(inputs.layer.parts, torch.arange(30, 34), inputs.queries))


def test_the_ratio_is_the_one_that_the_budget_leaves() -> None:
    made = policy("RatioScorer", budget=24, reads_queries=False)
    scores = made.score(make_inputs(new_tokens=100, total_tokens=100))
    assert scores.sum(1).tolist() == [24.0, 24.0]
    assert made.scorer.compression_ratio == 0.0  # type: ignore[attr-defined]  # what all sessions share stays as it is


def test_another_scaling_than_the_root_of_d_is_the_models() -> None:
    inputs, _ = frozen_inputs()
    sharper = AttentionInputs(**{**vars(inputs), "scaling": inputs.scaling * 2, "scratch": {}, "state": {}})
    louder = AttentionInputs(**{**vars(inputs), "queries": inputs.queries * 2, "scratch": {}, "state": {}})
    made = policy("WindowScorer")
    torch.testing.assert_close(made.score(sharper), made.score(louder))


def test_filler_is_not_shown_to_a_scorer() -> None:
    inputs = make_inputs(new_tokens=20, total_tokens=60, turn=1, evicted=8, ragged=3)
    inputs.keys[-1, :3] = float("nan")
    scores = policy("KeyLengthScorer", reads_queries=False).score(inputs)
    assert torch.equal(scores[-1, :3], torch.full((3,), float("-inf"), dtype=scores.dtype))
    torch.testing.assert_close(scores[-1, 3:], -inputs.keys[-1, 3:].norm(dim=-1))
    assert torch.isfinite(policy("WindowScorer", window_size=8).score(inputs)[:, 3:]).all()


def test_what_a_scorer_writes_into_is_its_own_copy() -> None:
    inputs = make_inputs()
    keys = inputs.keys.clone()
    policy("Careless", reads_queries=False).score(inputs)
    assert torch.equal(inputs.keys, keys)


@pytest.mark.parametrize(
    ("press", "says"),
    [
        (
            "Curious",
            "decode policy 'kvpress', scorer Curious: AttributeError: .* 'k_proj', which loopserve-kvpress cannot",
        ),
        ("Unbatched", r"scorer Unbatched: score must give \[1, 2, 48\], it gave \[2, 48\]"),
    ],
)
def test_a_scorer_that_cannot_be_served_is_named(press: str, says: str) -> None:
    with pytest.raises(PolicyError, match=says):
        policy(press).score(make_inputs())


def test_an_assertion_of_a_scorer_is_its_reason() -> None:
    with pytest.raises(PolicyError, match="48 pairs are not more than the window of 64"):
        policy("WindowScorer", window_size=64).score(make_inputs())


# In stack files


@pytest.fixture(scope="module")
def registry() -> Registry:
    found = Registry()
    built_in(found)
    loopserve_register_policies(found)
    return found


def test_it_stands_in_a_stack_file_and_inside_a_wrapper(registry: Registry) -> None:
    inner = {"policy": "kvpress", "press": "WindowScorer", "options": {"window_size": 8}, "budget": 64}
    stack = resolve_stack({"prefill": {"policy": "dense"}, "decode": {"policy": "adakv", "inner": inner}}, registry)
    assert resolve_stack(stack.describe(), registry) == stack
    assert stack.decode.effective_capabilities.needs == {Need.ROTARY}
    assert registry.get(Kind.DECODE, "kvpress").paper


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({}, "decode.press: this key is required"),
        ({"press": "WindowScore"}, "unknown scorer 'WindowScore'; did you mean 'WindowScorer'?"),
        ({"press": "NoScorer"}, "'NoScorer' has no method score"),
        ({"press": "WindowScorer", "options": {"windw": 3}}, "WindowScorer does not take these options .* it takes"),
        ({"press": "WindowScorer", "options": {"compression_ratio": 0.5}}, "the policy's budget says how many"),
    ],
)
def test_what_cannot_be_made_is_refused_at_load(registry: Registry, fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        resolve_stack({"prefill": {"policy": "dense"}, "decode": {"policy": "kvpress", **fields}}, registry)


def test_without_kvpress_it_says_what_to_do(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kvpress", None)
    with pytest.raises(
        ConfigError, match=r"kvpress cannot be imported .* as an entry point of the group 'loopserve_kvpress'"
    ):
        resolve_stack(
            {"prefill": {"policy": "dense"}, "decode": {"policy": "kvpress", "press": "SnapKVPress"}}, registry
        )


class Interleaved(PlainParts):
    """Rotate neighbouring channels, as GLM does."""

    def rotate(self, vectors: torch.Tensor, positions: torch.Tensor, *, back: bool = False) -> torch.Tensor:
        order = torch.arange(vectors.shape[-1]).view(-1, 2).T.flatten()
        return super().rotate(vectors[..., order], positions, back=back)[..., order.argsort()]


def test_a_model_that_rotates_otherwise_is_refused_unless_queries_do_not_matter() -> None:
    layer = LayerSpec(0, LayerType.FULL, 4, 2, 16, parts=Interleaved(4, 16))
    assert "this model rotates otherwise" in str(policy("WindowScorer").refuses(layer))
    assert policy("KeyLengthScorer", reads_queries=False).refuses(layer) is None
    assert policy("WindowScorer").refuses(LayerSpec(0, LayerType.FULL, 4, 2, 16, parts=PlainParts(4, 16))) is None


class OwnDecode(ScorerDecode):
    """Keep the pairs with the smallest keys, by a scorer of this file."""

    name = "own"
    paper = ""
    scorer = kvpress_like.KeyLengthScorer()


def test_a_scorer_can_be_a_policy_of_its_own() -> None:
    registry = Registry()
    registry.register(OwnDecode)
    inputs = make_inputs()
    assert torch.equal(OwnDecode(OwnDecode.Config()).score(inputs), -inputs.keys.norm(dim=-1))


class SnapLike(ScorerDecode):
    """Keep the pairs that the last rows attend to, by a scorer that reads queries."""

    name = "snap_like"
    paper = ""
    scorer = kvpress_like.WindowScorer(window_size=4)


@parametrize_with_policy_checks([OwnDecode, SnapLike])
def test_conformance(policy: Any, check: Any) -> None:
    check(policy)
