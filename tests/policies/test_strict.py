"""No built-in policy does anything that strict checks mind: they would say so."""

from __future__ import annotations

import pytest
import torch

from loopserve.core.kv.selection import Retention
from loopserve.core.policy.registry import Kind, Registration
from tests.policies.conversations import DENSE, FULL, answers, engine
from tests.policies.small import COMPRESSORS, POLICIES, label, spec

TURNS = (41, 29)


def logits(policy: Registration, retention: Retention, **options: str) -> torch.Tensor:
    written = {"prefill": DENSE, "decode": FULL, policy.kind.value: spec(policy, retention)}
    served = engine("llama", written["prefill"], written["decode"], **options)
    return torch.cat(list(answers(served, served.session(), turns=TURNS)))


@pytest.mark.parametrize("policy", POLICIES, ids=label)
def test_strict_checks_find_nothing_and_change_nothing(policy: Registration) -> None:
    kept = logits(policy, Retention.KEEP, policy_checks="strict")
    assert torch.equal(kept, logits(policy, Retention.KEEP))


@pytest.mark.parametrize(
    "policy", [each for each in COMPRESSORS if Retention.EVICT in each.capabilities.retentions], ids=label
)
def test_nor_where_pairs_are_evicted(policy: Registration) -> None:
    assert policy.kind is Kind.DECODE
    assert not logits(policy, Retention.EVICT, policy_checks="strict").isnan().any()
