"""Policies against what kvpress answered (``make oracle`` froze it): scores to 1e-5, kept sets exactly.

``make oracle-check`` runs these alone and prints each policy with its largest difference.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from loopserve.core.kv.selection import KVSelection
from loopserve.core.policy.interfaces import AttentionInputs, Phase
from loopserve.core.policy.layers import LayerSpec, LayerType
from loopserve.core.policy.scoring import ScoredCompressor
from loopserve.policies.decode.adakv import AdaKVDecode
from loopserve.policies.decode.chunkkv import ChunkKVDecode
from loopserve.policies.decode.criticalkv import CriticalKVDecode
from loopserve.policies.decode.expected_attention import ExpectedAttentionDecode
from loopserve.policies.decode.h2o import H2ODecode
from loopserve.policies.decode.keydiff import KeyDiffDecode
from loopserve.policies.decode.knorm import KnormDecode
from loopserve.policies.decode.lagkv import LagKVDecode
from loopserve.policies.decode.pyramidkv import PyramidKVDecode, pyramid
from loopserve.policies.decode.snapkv import SnapKVDecode
from loopserve.policies.decode.streaming_llm import StreamingLLMDecode
from loopserve.policies.decode.tova import TOVADecode
from loopserve.testing.inputs import FakeRecord, PlainParts
from loopserve.testing.scripted import ScriptedConversation

FIXTURES = Path(__file__).parent / "fixtures"
RECORD = json.loads((FIXTURES / "kvpress.json").read_text("utf-8"))
MODELS = list(RECORD["models"])
BARE = {"sink_tokens": 0, "recent_window": 0}
TOLERANCE = 1e-5


def snap(budget: int, window: int = 8, kernel: int = 5) -> SnapKVDecode:
    return SnapKVDecode(SnapKVDecode.Config(budget=budget, window=window, kernel=kernel, **BARE))


def expected(budget: int, **fields: Any) -> ExpectedAttentionDecode:
    options = {"budget": budget, "sink_tokens": 4, "recent_window": 0} | fields
    return ExpectedAttentionDecode(ExpectedAttentionDecode.Config(**options))


def knorm(budget: int) -> KnormDecode:
    return KnormDecode(KnormDecode.Config(budget=budget, **BARE))


def lag(budget: int, **fields: Any) -> LagKVDecode:
    return LagKVDecode(
        LagKVDecode.Config(budget=budget, **({"sink_tokens": 4, "recent_window": 0, "lag": 16} | fields))
    )


def ada(inner: ScoredCompressor, **fields: Any) -> AdaKVDecode:
    return AdaKVDecode(AdaKVDecode.Config(inner=inner, **fields))


def critical(inner: ScoredCompressor, **fields: Any) -> CriticalKVDecode:
    return CriticalKVDecode(CriticalKVDecode.Config(inner=inner, **fields))


def chunks(inner: ScoredCompressor, chunk: int) -> ChunkKVDecode:
    return ChunkKVDecode(ChunkKVDecode.Config(inner=inner, chunk=chunk))


def observed(budget: int) -> H2ODecode:
    return H2ODecode(H2ODecode.Config(budget=budget, heavy_share=1.0, normalise=True, rolling=False, **BARE))


def tova(budget: int) -> TOVADecode:
    return TOVADecode(TOVADecode.Config(budget=budget, recent_window=1))


def keydiff(budget: int) -> KeyDiffDecode:
    return KeyDiffDecode(KeyDiffDecode.Config(budget=budget, **BARE))


def pyramidkv(budget: int) -> PyramidKVDecode:
    return PyramidKVDecode(PyramidKVDecode.Config(inner=snap(budget), beta=5, window=8))


OURS: dict[str, Callable[[int], ScoredCompressor]] = {
    "snapkv": lambda n: snap(n, 16, 5),
    "snapkv_wide": lambda n: snap(n, 8, 7),
    "tova": tova,
    "observed_attention": observed,
    "knorm": knorm,
    "keydiff": keydiff,
    "expected_attention": expected,
    "expected_attention_mean": lambda n: expected(n, future=64, sink_tokens=2, covariance=False, value_norm=False),
    "expected_attention_epsilon": lambda n: expected(n, future=128, epsilon=1e-2),
    "lagkv": lag,
    "lagkv_cross": lambda n: lag(n, cross_scoring=True),
    "lagkv_short": lambda n: lag(n, lag=128),
    "criticalkv_snapkv": lambda n: critical(snap(n)),
    "criticalkv_expected": lambda n: critical(expected(n, value_norm=False), epsilon=1e-4, first_stage=0.3),
    "adakv_snapkv": lambda n: ada(snap(n)),
    "adakv_expected": lambda n: ada(expected(n, epsilon=1e-2), safeguard=0.4),
    "adakv_knorm": lambda n: ada(knorm(n)),
    "adakv_critical": lambda n: ada(critical(snap(n))),
    "chunkkv_snapkv": lambda n: chunks(snap(n), 8),
    "chunkkv_knorm": lambda n: chunks(knorm(n), 5),
    "pyramidkv": pyramidkv,
}
WITH_TIES = {"lagkv"}  # ranks are equal across partitions: which of them kvpress takes is its sort's whim


class FrozenParts(PlainParts):
    """Plain rotary positions, as the frozen model's, and its output weight ``[E, Hq * D]``."""

    def __init__(self, heads: int, weight: Tensor) -> None:
        super().__init__(heads, weight.shape[1] // heads)
        self._weight = weight.T.reshape(heads, -1, len(weight))


@cache
def frozen(model: str) -> dict[str, Tensor]:
    return load_file(FIXTURES / f"{model}.safetensors")


def inputs_of(model: str) -> AttentionInputs:
    found, shape = frozen(model), RECORD["models"][model]
    parts = FrozenParts(shape["heads"], found["output_weight"])
    layers = tuple(
        LayerSpec(index, LayerType.FULL, shape["heads"], shape["kv_heads"], shape["dim"], parts=parts)
        for index in range(3)
    )
    return AttentionInputs(
        queries=found["queries"],
        keys=found["keys"],
        values=found["values"],
        columns=torch.arange(shape["tokens"]),
        positions=torch.arange(shape["tokens"]),
        first_valid=None,
        layer=layers[RECORD["layer"]],
        phase=Phase.PREFILL,
        turn=0,
        turn_start=0,
        output_index=0,
        final=True,
        scaling=shape["dim"] ** -0.5,
        softcap=None,
        record=FakeRecord(),
        compressor_layers=layers,
    )


def kept_by(model: str, press: str) -> list[list[int]]:
    rows: list[list[int]] = RECORD["models"][model]["kept"][press]
    return rows


def budget_of(model: str, press: str) -> int:
    """Pairs per head on the average, as kvpress kept them (the pyramid's layer keeps its own)."""
    kept = kept_by(model, press)
    return 32 if press == "pyramidkv" else sum(map(len, kept)) // len(kept)


def selection(policy: ScoredCompressor, inputs: AttentionInputs) -> KVSelection:
    state = policy.init_state()
    policy.after_attention(inputs, state)
    return state.pending[inputs.layer.index]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("press", [name for name in OURS if name not in WITH_TIES])
def test_kept_sets_are_the_same(model: str, press: str) -> None:
    policy = OURS[press](budget_of(model, press))
    found = selection(policy, inputs_of(model))
    assert [found.head(head).tolist() for head in range(len(found.lengths))] == kept_by(model, press)


def largest_difference(model: str, press: str) -> float:
    """Between our ranking and their scores, forced pairs aside; those must stand above all others on both sides."""
    policy, inputs = OURS[press](budget_of(model, press)), inputs_of(model)
    theirs = frozen(model)[f"scores.{press}"]
    state = policy.init_state()
    policy.observe(inputs, state)
    found = policy.ranking(inputs, state, policy.limits.budget).float().clone()
    found[:, found.shape[1] - policy.limits.recent_window :] = float(
        "inf"
    )  # kept by the template, whatever their score
    forced = found.isinf()
    if forced.any():
        assert theirs[forced].min() >= theirs[~forced].max()
    return float((found - theirs)[~forced].abs().max())


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("press", [name for name in OURS if f"scores.{name}" in frozen("grouped")])
def test_scores_are_the_same(model: str, press: str) -> None:
    assert largest_difference(model, press) <= TOLERANCE


@pytest.mark.parametrize("model", MODELS)
def test_lagkv_keeps_its_ranks_in_full(model: str) -> None:
    """Ranks above the one where the budget ends are all kept; within it, we take the lowest positions."""
    theirs = frozen(model)["scores.lagkv"]
    found = selection(lag(budget_of(model, "lagkv")), inputs_of(model))
    for head, scores in enumerate(theirs):
        mine = found.head(head)
        least = scores[mine].min()
        assert set((scores > least).nonzero().flatten().tolist()) <= set(mine.tolist())
        tied = (scores == least).nonzero().flatten()
        taken = mine[torch.isin(mine, tied)]
        assert taken.tolist() == tied[: len(taken)].tolist()


@pytest.mark.parametrize("model", MODELS)
def test_streaming_llm_keeps_the_same_columns(model: str) -> None:
    rows = kept_by(model, "streaming_llm")
    shape = RECORD["models"][model]
    policy = StreamingLLMDecode(
        StreamingLLMDecode.Config(budget=len(rows[0]) + 1, sink_tokens=4)
    )  # one for the next token
    keys = frozen(model)["keys"][None]
    talk = ScriptedConversation(policy, frozen(model)["queries"][None], keys)
    talk.prefill(shape["tokens"])
    chosen = talk.active()
    assert chosen is not None
    assert [chosen.head(head).tolist() for head in range(len(rows))] == rows


@pytest.mark.parametrize("row", RECORD["pyramid_budgets"], ids=lambda row: "-".join(str(v) for v in row.values())[:40])
def test_pyramid_budgets_are_the_same(row: dict[str, Any]) -> None:
    layers = len(row["budgets"])
    assert pyramid(row["total"], row["mean"], row["window"], row["beta"], layers) == row["budgets"]


WRONG: dict[str, Callable[[int], ScoredCompressor]] = {
    "snapkv": lambda n: snap(n, 16, 7),
    "expected_attention": lambda n: expected(n, value_norm=False),
    "keydiff": knorm,
    "observed_attention": lambda n: H2ODecode(H2ODecode.Config(budget=n, heavy_share=1.0, rolling=False, **BARE)),
    "criticalkv_snapkv": snap,
    "adakv_snapkv": snap,
    "chunkkv_snapkv": snap,
}


@pytest.mark.parametrize("press", list(WRONG))
def test_a_wrong_variant_would_be_noticed(press: str) -> None:
    inputs = inputs_of("grouped")
    found = selection(WRONG[press](budget_of("grouped", press)), inputs)
    assert [found.head(head).tolist() for head in range(len(found.lengths))] != kept_by("grouped", press)


def test_queries_are_turned_back_as_the_model_turned_them() -> None:
    inputs = inputs_of("grouped")
    assert inputs.layer.parts is not None
    back = inputs.layer.parts.rotate(inputs.queries, inputs.columns, back=True)
    assert torch.allclose(inputs.layer.parts.rotate(back, inputs.columns), inputs.queries, atol=1e-5)
    later = replace(inputs, positions=inputs.positions + 1)
    assert not torch.allclose(inputs.layer.parts.rotate(inputs.queries, later.positions, back=True), back, atol=1e-3)


def test_the_record_says_where_it_comes_from() -> None:
    assert RECORD["versions"]["kvpress"] == "0.5.5" and RECORD["seed"] >= 0
    assert sum(each.stat().st_size for each in FIXTURES.iterdir()) < 2 << 20
