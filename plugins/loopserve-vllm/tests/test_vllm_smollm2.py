"""The needles of SmolLM2's demonstration, in vLLM and in loopserve's own engine. Downloads the model, so it is asked for by name."""

from __future__ import annotations

import os

import pytest
from serving import beside_own_engine, engine, serve_under

from loopserve import Engine, load_stack
from loopserve.bench.book_demo import book_turns
from loopserve.bench.budget import with_budget
from loopserve.models.catalog import named_directory

pytestmark = pytest.mark.skipif(not os.environ.get("LOOPSERVE_TEST_SMOLLM2"), reason="set LOOPSERVE_TEST_SMOLLM2=1")


def test_the_needles_are_answered_as_by_loopserves_engine() -> None:
    llm = engine("dense", named_directory("smollm2"), max_num_batched_tokens=4096, max_num_seqs=1)
    dialogue = [turn.message for turn in book_turns()]
    for stack in (load_stack("dense"), with_budget(load_stack("loopserve"), 256)):
        serve_under(llm, stack)
        own = Engine.from_pretrained("smollm2", stack, dtype="float32", device="cpu")
        same, _ = beside_own_engine(llm, own, [dialogue], 32)
        assert all(same)
