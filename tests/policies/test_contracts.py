"""What holds for every policy that comes in through the built-in plugin: form, options, determinism, documentation."""

from __future__ import annotations

import copy
import inspect
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from loopserve.core.interfaces import DecodeCompressor, PrefillSparsifier, Retention
from loopserve.core.nesting import written
from loopserve.core.registry import Kind, Registration
from loopserve.testing.assertions import assert_pattern, unchanged
from loopserve.testing.inputs import make_inputs
from loopserve.testing.scripted import ScriptedConversation
from loopserve.testing.tables import renewed
from tests.policies.small import (
    COMPRESSORS,
    POLICIES,
    SPARSIFIERS,
    built,
    default,
    label,
    registered,
    small,
    spec,
)


def test_all_are_there() -> None:
    assert registered().names(Kind.PREFILL) == [
        "a_shape",
        "dense",
        "flexprefill",
        "loopserve",
        "minference",
        "sample_attention",
        "static_lines",
        "topk_blocks",
        "tri_shape",
        "xattention",
    ]
    assert registered().names(Kind.DECODE) == [
        "adakv",
        "chunkkv",
        "criticalkv",
        "expected_attention",
        "full",
        "h2o",
        "keydiff",
        "knorm",
        "lagkv",
        "loopserve",
        "pyramidkv",
        "quest",
        "random",
        "recover_alpha",
        "rocketkv_mt",
        "snapkv",
        "streaming_llm",
        "tova",
    ]


@pytest.mark.parametrize("policy", POLICIES, ids=label)
def test_docstrings_say_what_happens_between_turns(policy: Registration) -> None:
    text = inspect.getdoc(policy.policy) or ""
    assert "Multi-turn:" in text
    assert policy.paper in text and (policy.paper.startswith("https://arxiv.org/abs/") or not policy.paper)


@pytest.mark.parametrize("policy", POLICIES, ids=label)
def test_options_are_described_frozen_and_closed(policy: Registration) -> None:
    config = default(policy).config
    assert all(field.description for field in policy.config.model_fields.values())
    with pytest.raises(ValidationError):
        policy.config.model_validate({"no_such_option": 1})
    for name in policy.config.model_fields:
        with pytest.raises(ValidationError):
            setattr(config, name, 1)
    assert written(built(policy.kind, written(default(policy)))) == written(default(policy))


@pytest.mark.parametrize("policy", POLICIES, ids=label)
@pytest.mark.parametrize("value", [-1, math.nan, math.inf, "many", None, [1]])
def test_numbers_that_make_no_sense_are_refused(policy: Registration, value: Any) -> None:
    for name, field in policy.config.model_fields.items():
        if field.annotation in (int, float):
            with pytest.raises(ValidationError):
                policy.config.model_validate({name: value})


@pytest.mark.parametrize(
    ("kind", "name", "fields"),
    [
        (Kind.PREFILL, "loopserve", {"alpha": 0}),
        (Kind.PREFILL, "loopserve", {"alpha": 1.01}),
        (Kind.PREFILL, "loopserve", {"row_floor": math.nan}),
        (Kind.PREFILL, "loopserve", {"sampling": "first"}),
        (Kind.PREFILL, "loopserve", {"cost": "time"}),
        (Kind.DECODE, "loopserve", {"budget": 10, "sink_tokens": 4, "recent_window": 4, "page_budget": 3}),
        (Kind.DECODE, "loopserve", {"budget": 10, "sink_tokens": 0, "recent_window": 0, "page_budget": 10}),
        (Kind.DECODE, "loopserve", {"memory": 1.5}),
        (Kind.DECODE, "loopserve", {"pooling": 4}),
        (Kind.DECODE, "loopserve", {"key_bits": 3}),
        (Kind.DECODE, "loopserve", {"pool": "active", "page_budget": 8}),
        (Kind.DECODE, "loopserve", {"pool": "active", "trigger": "drift"}),
        (Kind.DECODE, "loopserve", {"drift_min_interval": 8, "drift_max_interval": 4}),
        (Kind.DECODE, "snapkv", {"kernel": 4}),
        (Kind.DECODE, "snapkv", {"budget": 31}),
        (Kind.DECODE, "random", {"budget": 20, "sink_tokens": 4, "recent_window": 17}),
        (Kind.DECODE, "streaming_llm", {"budget": 4, "sink_tokens": 4}),
    ],
)
def test_options_that_do_not_go_together_are_refused(kind: Kind, name: str, fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        registered().get(kind, name).config.model_validate(fields)


def test_a_policy_evicts_only_if_its_capabilities_say_so() -> None:
    for each in COMPRESSORS:
        if Retention.EVICT in each.capabilities.retentions:
            assert built(each.kind, spec(each, Retention.EVICT)).retention is Retention.EVICT
        assert small(each).retention is Retention.KEEP


@pytest.mark.parametrize("policy", SPARSIFIERS, ids=label)
@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (40, 40), (63, 111)])
def test_patterns_are_causal_and_can_be_repeated(policy: Registration, shape: tuple[int, int]) -> None:
    sparsifier: PrefillSparsifier = small(policy)
    inputs = make_inputs(new_tokens=shape[0], total_tokens=shape[1])
    with unchanged(inputs):
        one, two = sparsifier.sparsify(inputs), sparsifier.sparsify(inputs)
    assert_pattern(one, inputs)
    assert torch.equal(one.to_mask(), two.to_mask())


def script(seed: int, length: int = 160) -> tuple[torch.Tensor, torch.Tensor]:
    source = torch.Generator().manual_seed(seed)
    return torch.randn(2, 4, length, 16, generator=source), torch.randn(2, 2, length, 16, generator=source)


def run(talk: ScriptedConversation, steps: list[tuple[str, int]]) -> None:
    for what, count in steps:
        getattr(talk, what)(count)


JUMPING = {
    "trigger": "drift",
    "page_budget": 6,
    "key_bits": 4,
    "page": 8,
    "second_hop": "kept",
    "drift_threshold": 0.95,
}
RUNS = [pytest.param(each, {}, id=label(each)) for each in COMPRESSORS]
RUNS.append(pytest.param(registered().get(Kind.DECODE, "loopserve"), JUMPING, id="decode loopserve, jumping"))
STEPS = [("prefill", 50), ("decode", 10), ("prefill", 1), ("decode", 4), ("prefill", 40), ("decode", 10)]


@pytest.mark.parametrize(("policy", "options"), RUNS)
def test_interleaved_conversations_equal_solo_ones_and_copies_go_on_alike(
    policy: Registration, options: dict[str, Any]
) -> None:
    compressor: DecodeCompressor[Any] = small(policy, **options)
    solo = [ScriptedConversation(compressor, *script(seed)) for seed in (0, 1)]
    mixed = [ScriptedConversation(compressor, *script(seed)) for seed in (0, 1)]
    for talk in solo:
        run(talk, STEPS)
    for step in STEPS:
        for talk in mixed:
            run(talk, [step])
            talk.state = copy.deepcopy(talk.state)
    assert not options or solo[0].record.counters["drift"] > 0
    for one, two in zip(solo, mixed, strict=True):
        assert len(one.selections) == len(two.selections)
        for left, right in zip(one.selections, two.selections, strict=True):
            assert all(torch.equal(left[layer].indices, right[layer].indices) for layer in left | right)


@pytest.mark.parametrize(("policy", "options"), RUNS)
def test_an_undone_turn_leaves_no_trace(policy: Registration, options: dict[str, Any]) -> None:
    """The session restores states and truncates the cache; what follows must not depend on what was taken back."""
    compressor: DecodeCompressor[Any] = small(policy, **options)
    talks = [ScriptedConversation(compressor, *script(0)) for _ in range(2)]
    for talk in talks:
        run(talk, STEPS[:2])
    undone = talks[1]
    undone.cache.release()
    before, seen, selections = copy.deepcopy(undone.state), undone.cache.seen, len(undone.selections)
    queries = undone.queries
    undone.queries = queries.flip(2)
    run(undone, [("prefill", 30), ("decode", 7)])
    undone.queries = queries
    undone.cache.truncate(seen)
    undone.state, undone.turn = before, 0
    del undone.selections[selections:]
    for talk in talks:
        run(talk, STEPS[2:])
    for left, right in zip(talks[0].selections, undone.selections, strict=True):
        assert all(torch.equal(left[layer].indices, right[layer].indices) for layer in left | right)


@pytest.mark.parametrize("page", ["docs/policies.md", "README.md"])
def test_the_tables_are_up_to_date(page: str) -> None:
    text = (Path(__file__).parents[2] / page).read_text("utf-8")
    assert renewed(text, registered()) == text, "run: python -m loopserve.testing.tables docs/policies.md README.md"


def test_the_plugin_is_cheap_to_import() -> None:
    code = "import sys, loopserve.policies; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
