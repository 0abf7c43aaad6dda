"""A stack over another engine's blocks attends through the block table, and gathers only what its policies ask for,
interpreted. Started by ``test_interpreted``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from loopserve.kernels import backend
from tests.core.paged_host import PAIRS, Host, Own, drawn, slots_of, table_of
from tests.core.test_hosted import STACKS, passes

assert os.environ.get("TRITON_INTERPRET") == "1"
PROMPT = 48  # the interpreter is slow
LINES = {"policy": "a_shape", "local_window": 8, "sink_tokens": 2}


@pytest.fixture(autouse=True)
def triton() -> Iterator[None]:
    with backend.use("triton"):
        yield


@pytest.mark.parametrize("name", ["threshold", "quest"])
def test_the_same_outputs_as_over_the_own_store(name: str) -> None:
    slots = slots_of({**STACKS[name], "prefill": LINES})
    host, own = Host(PAIRS), Own(slots, PROMPT)
    turn = host.begin(slots, PROMPT)
    for given in passes(PROMPT, outputs=3):
        for layer, (found, wanted) in enumerate(zip(host.run(turn, given), own.run(given), strict=True)):
            if found is None:  # left to the host
                found = own.dense(layer, given[layer][0])
            torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    ours, theirs = turn.stats.as_dict(), own.session.stats.as_dict()
    for figure in ("attended_fraction", "prefill_cell_density", "faults"):
        assert ours[figure] == theirs[figure], figure
    counts = table_of(turn).counts
    assert not counts["gathered_values"]  # lines and chosen pairs are read where they lie


def test_decoding_gathers_nothing() -> None:
    host, slots = Host(PAIRS), slots_of({**STACKS["threshold"], "prefill": LINES})
    turn = host.begin(slots, PROMPT)
    *prompt, last = passes(PROMPT, outputs=1)
    for given in prompt:
        host.run(turn, given)
    host.run(turn, last)
    before = table_of(turn).counts.copy()
    for seed in (20, 21, 22):
        assert None not in host.run(turn, drawn(1, seed))
    after = table_of(turn).counts
    for figure in ("gathered_keys", "gathered_values", "chosen_pairs", "read_pairs"):
        assert after[figure] == before[figure], figure
    assert turn.stats.as_dict()["attended_fraction"] < 0.7


def test_lines_that_look_at_no_key_gather_nothing() -> None:
    host = Host(PAIRS)
    slots = slots_of({"prefill": LINES, "decode": {"policy": "full"}})
    turn = host.begin(slots, PROMPT)
    for given in passes(PROMPT, outputs=0):
        assert None not in host.run(turn, given)
    assert not table_of(turn).counts
