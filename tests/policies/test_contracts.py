"""What holds for every policy that comes in through the built-in plugin, beyond what the conformance kit asks of all."""

from __future__ import annotations

import inspect
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from loopserve.core.kv.selection import Retention
from loopserve.core.policy.interfaces import PrefillSparsifier
from loopserve.core.policy.registry import Kind, Registration
from loopserve.policies.decode.snapkv import SnapKVDecode
from loopserve.testing.assertions import assert_pattern, unchanged
from loopserve.testing.inputs import make_inputs
from loopserve.testing.tables import renewed
from tests.policies.small import (
    COMPRESSORS,
    POLICIES,
    SPARSIFIERS,
    built,
    label,
    registered,
    small,
    spec,
)

PUBLISHERS = ("https://arxiv.org/abs/", "https://openreview.net/forum?id=")


def test_all_are_there() -> None:
    assert registered().names(Kind.PREFILL) == [
        "a_shape",
        "dense",
        "duo",
        "flashprefill",
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
        "duo",
        "expected_attention",
        "flowkv",
        "full",
        "h2o",
        "keydiff",
        "knorm",
        "kvzip",
        "lagkv",
        "loopserve",
        "omnikv",
        "pyramidkv",
        "quest",
        "random",
        "recover_alpha",
        "rkv",
        "rocketkv_mt",
        "snapkv",
        "streaming_llm",
        "tova",
        "twilight",
    ]


@pytest.mark.parametrize("policy", POLICIES, ids=label)
def test_docstrings_say_what_happens_between_turns(policy: Registration) -> None:
    text = inspect.getdoc(policy.policy) or ""
    assert "Multi-turn:" in text
    assert policy.paper in text and (policy.paper.startswith(PUBLISHERS) or not policy.paper)


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
        (Kind.PREFILL, "loopserve", {"least_weight": 0}),
        (Kind.PREFILL, "loopserve", {"least_weight": 0.01, "overlap": False}),
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
        (Kind.DECODE, "rkv", {"kernel": 4}),
        (Kind.DECODE, "rkv", {"budget": 8, "sink_tokens": 1}),
        (Kind.DECODE, "omnikv", {"filter_layers": ()}),
        (Kind.DECODE, "omnikv", {"filter_layers": (3, 3)}),
        (Kind.DECODE, "omnikv", {"filter_layers": (-1, 3)}),
        (Kind.DECODE, "twilight", {"inner": SnapKVDecode(SnapKVDecode.Config(retention=Retention.EVICT))}),
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


@pytest.mark.parametrize("page", ["docs/policies.md", "README.md"])
def test_the_tables_are_up_to_date(page: str) -> None:
    text = (Path(__file__).parents[2] / page).read_text("utf-8")
    assert renewed(text, registered()) == text, "run: python -m loopserve.testing.tables docs/policies.md README.md"


def test_the_plugin_is_cheap_to_import() -> None:
    code = "import sys, loopserve.policies; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
