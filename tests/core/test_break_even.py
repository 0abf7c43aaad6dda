"""From which lengths a stack pays: what follows from times, and what the engine does below."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loopserve import Engine, load_stack
from loopserve.core.engine.break_even import LONG_TURN, BreakEven, Pair, pays_from
from loopserve.core.engine.engine import TokenEngine
from loopserve.core.engine.sampling import SamplingConfig
from loopserve.core.engine.stats import TurnStats

LENGTHS = (2048, 4096, 6144, 8000)
PROMPT = [token % 1000 for token in range(3, 1700)]


def lines(dense: tuple[float, float], sparse: tuple[float, float]) -> list[Pair]:
    """Return times that grow with length in lines, each given by its start and what 1,000 tokens add."""
    return [Pair(n, dense[0] + dense[1] * n / 1000, sparse[0] + sparse[1] * n / 1000) for n in LENGTHS]


def test_it_pays_from_the_crossing_of_the_lines() -> None:
    assert pays_from(lines((10, 4), (20, 2))) == pytest.approx(5000)
    assert pays_from(lines((10, 2), (30, 1))) == pytest.approx(20_000)  # beyond what was measured


def test_it_pays_everywhere_or_nowhere() -> None:
    assert pays_from(lines((10, 4), (10, 2))) == 0
    assert pays_from([]) == 0  # the stack itself was dense wherever it was measured
    assert pays_from(lines((10, 2), (12, 2))) == math.inf
    assert pays_from(lines((10, 2), (9, 3))) == math.inf
    assert pays_from([Pair(8000, 1.0, 1.1)]) == math.inf


@given(st.lists(st.tuples(st.floats(1e-3, 10), st.floats(1e-3, 10)), min_size=len(LENGTHS), max_size=len(LENGTHS)))
def test_no_length_at_which_it_was_slower_is_let_through(times: list[tuple[float, float]]) -> None:
    limit = pays_from([Pair(n, *each) for n, each in zip(LENGTHS, times, strict=True)])
    assert all(n < limit for n, (dense, sparse) in zip(LENGTHS, times, strict=True) if sparse > 1.021 * dense)


def test_passes_of_many_and_of_few_new_tokens_have_limits_of_their_own() -> None:
    limits = BreakEven(long_turn=3000, short_turn=5000)
    assert limits.allows_sparse(LONG_TURN, 3000) and not limits.allows_sparse(LONG_TURN, 2999)
    assert limits.allows_sparse(LONG_TURN - 1, 5000) and not limits.allows_sparse(LONG_TURN - 1, 4999)


def test_only_compressors_that_can_begin_late_do() -> None:
    assert BreakEven(decode=6000.5).dense_below(0) == 0
    assert BreakEven(decode=6000.5).dense_below(4096) == 6000
    assert BreakEven(decode=100).dense_below(4096) == 4096
    assert BreakEven(decode=math.inf).dense_below(1) > 10**12


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine.from_pretrained("demo", "dense")


def answered(engine: Engine, stack: Any, break_even: BreakEven | None) -> tuple[list[int], TurnStats]:
    own = TokenEngine(engine.token_engine.model, load_stack(stack), break_even=break_even)
    session = own.session()
    output = list(own.generate(session, PROMPT, SamplingConfig(max_new_tokens=6)))
    return output, session.turns[-1]


STACK = {
    "version": 1,
    "prefill": {"policy": "loopserve", "alpha": 0.9, "min_total_tokens": 0},
    "decode": {"policy": "loopserve", "budget": 128, "dense_below": 1, "page_budget": 64},
}


def test_below_its_limits_a_stack_is_dense(engine: Engine) -> None:
    dense = answered(engine, "dense", None)[0]
    output, stats = answered(engine, STACK, BreakEven(10_000, 10_000, 10_000))
    figures = stats.as_dict()
    assert output == dense
    assert figures["prefill_cell_density"] == figures["attended_fraction"] == 1
    assert stats.counters["fallback:below_break_even"] > 0


def test_each_phase_has_a_limit_of_its_own(engine: Engine) -> None:
    free = answered(engine, STACK, None)[1].as_dict()
    assert free["prefill_cell_density"] < 1 and free["attended_fraction"] < 1
    decode = answered(engine, STACK, BreakEven(decode=10_000))[1].as_dict()
    assert decode["prefill_cell_density"] == free["prefill_cell_density"] and decode["attended_fraction"] == 1
    prefill = answered(engine, STACK, BreakEven(10_000, 10_000))[1].as_dict()
    assert prefill["prefill_cell_density"] == 1 and prefill["attended_fraction"] < 1


def test_above_its_limits_a_stack_is_as_without_them(engine: Engine) -> None:
    assert answered(engine, STACK, BreakEven(1000, 1000, 1000))[0] == answered(engine, STACK, None)[0]
