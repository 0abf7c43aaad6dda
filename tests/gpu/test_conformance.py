"""Which sparsifiers choose and attend without waiting for the GPU, as the conformance kit asks."""

from __future__ import annotations

import pytest

from loopserve.core.policy.registry import Registration
from loopserve.testing.checks.sparsifier import gpu_is_never_waited_for
from loopserve.testing.subject import Subject
from tests.policies.small import SPARSIFIERS, label

# Found by reading, before any of them ran on a GPU; a test that passes here all the same is only reported.
WAITS = {
    "flexprefill": "looks which heads are query-aware before it computes their blocks",
    "loopserve": "looks whether a head is to be computed dense, and carries the rows it drew to the device",
    "minference": "its rows' numbers are read back as the key under which their attention is kept",
    "sample_attention": "its rows' numbers are read back as the key under which their attention is kept",
    "static_lines": "its rows' numbers are read back as the key under which their attention is kept",
}
CASES = [
    pytest.param(
        each,
        id=label(each),
        marks=[pytest.mark.xfail(reason=WAITS[each.name], strict=False)] if each.name in WAITS else [],
    )
    for each in SPARSIFIERS
]


@pytest.mark.parametrize("policy", CASES)
def test_it_does_not_wait_for_the_gpu(policy: Registration) -> None:
    gpu_is_never_waited_for(Subject(policy.policy))
