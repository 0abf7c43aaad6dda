"""The choice of columns and the codes of keys against their references, interpreted. Started by ``test_interpreted``."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from loopserve.core.kv.key_summaries import KeySummaries
from loopserve.kernels import backend
from loopserve.kernels.key_codes import BITS, code_jumps
from loopserve.kernels.top_columns import top_columns
from tests.kernels.test_key_codes import coded

assert os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture(autouse=True, scope="module")
def short_rows_have_many_blocks() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("loopserve.kernels.gpu.top_columns._BLOCK", 64)
        patch.setattr("loopserve.kernels.gpu.top_columns._BLOCKS", 4)
        patch.setattr("loopserve.kernels.gpu.top_columns._RANKED", 256)
        yield


@given(
    total=st.sampled_from([1, 2, 17, 64, 300, 1000]),
    share=st.floats(0.0, 1.2),
    sinks=st.integers(0, 5),
    recent=st.integers(0, 20),
    ties=st.booleans(),
    odd=st.sampled_from([None, float("nan"), float("inf"), float("-inf"), -0.0]),
    filler=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    seed=st.integers(0, 99),
)
@settings(max_examples=40)
def test_the_best_columns_are_the_same(
    total: int,
    share: float,
    sinks: int,
    recent: int,
    ties: bool,
    odd: float | None,
    filler: bool,
    dtype: torch.dtype,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(3, total + 1, generator=generator)[:, :total]  # rows that do not lie side by side
    if ties:
        scores = (scores * 2).round()
    if odd is not None:
        scores[torch.rand(3, total, generator=generator) < 0.2] = odd
    scores, budget = scores.to(dtype), int(share * total)
    first_valid = torch.randint(0, max(1, total - budget + 1), (3,), generator=generator) if filler else None
    found = []
    for name in ("reference", "triton"):
        with backend.use(name):
            found.append(top_columns(scores, budget, sink_tokens=sinks, recent_window=recent, first_valid=first_valid))
    assert torch.equal(*found)


@st.composite
def coded_case(draw: st.DrawFn) -> tuple[Tensor, Tensor, int, int]:
    """(keys ``[2, n, D]`` before NaN, queries of few rows, columns per page, bits)."""
    total, dim = draw(st.sampled_from([1, 31, 64, 200])), draw(st.sampled_from([8, 16, 40, 64]))
    group, rows = draw(st.sampled_from([(1, 1), (4, 1), (7, 1), (3, 5)]))
    dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    whole = torch.full((2, total + 3, dim), float("nan"), dtype=dtype)  # nothing behind the last key may be read
    whole[:, :total] = torch.randn(2, total, dim, generator=generator).to(dtype)
    queries = torch.randn(2 * group, rows, dim, generator=generator).to(dtype)
    page = draw(
        st.sampled_from([7, 16, 32, 100])
    )  # a page is a program, which the interpreter pays for: few of one key
    return whole[:, :total], queries, 1 if total < 32 else page, draw(st.sampled_from(BITS))


def held_columns(codes: Tensor, total: int) -> Tensor:
    """Codes without those behind the last column, which mean nothing."""
    return codes.flatten(1, 2)[:, :total]


@given(coded_case(), st.data())
@settings(max_examples=16)
def test_codes_and_what_they_say_are_the_same(case: tuple[Tensor, Tensor, int, int], data: st.DataObject) -> None:
    keys, queries, page, bits = case
    total = keys.shape[1]
    tail = data.draw(st.integers(0, total))
    generator = torch.Generator().manual_seed(total)
    base = torch.stack([torch.randperm(tail, generator=generator)[: tail // 4].sort().values for _ in range(2)])
    budget = data.draw(st.integers(0, tail - tail // 4))
    found = {}
    for name in ("reference", "triton"):
        with backend.use(name):
            pages = coded(keys, page, bits)
            observed = torch.ones(2, tail)
            jumps = pages.jumps(queries, base, tail, budget, 0.3, observed)
            assert torch.equal(jumps, pages.jumps(queries, base, tail, budget, 0.3))
            found[name] = pages, pages.logits(queries, 0.3), observed, jumps
    wanted, right = found["reference"][0], found["triton"][0]
    assert torch.equal(wanted.low, right.low) and torch.equal(wanted.high, right.high)
    assert torch.equal(held_columns(wanted.codes, total), held_columns(right.codes, total))
    for each, other in zip(found["triton"][1:3], found["reference"][1:3], strict=True):
        torch.testing.assert_close(each, other, atol=2e-5, rtol=2e-5)
    jumps, best = found["triton"][3], found["reference"][1].amax(1)
    assert jumps.shape == found["reference"][3].shape and (jumps.diff(dim=1) > 0).all()
    for head, chosen in enumerate(jumps):
        assert set(base[head].tolist()) <= set(chosen.tolist())
        # Logits that differ by rounding may change places: what was chosen is worth as much as the reference's choice.
        worth, most = (best[head][each].sort().values for each in (chosen, found["reference"][3][head]))
        torch.testing.assert_close(worth, most, atol=2e-5, rtol=2e-5)


def test_bounds_alone() -> None:
    keys = torch.randn(2, 50, 24, generator=torch.Generator().manual_seed(0)).half()
    found = []
    for name in ("reference", "triton"):
        with backend.use(name):
            found.append(coded(keys, 7, 0))
    assert torch.equal(found[0].low, found[1].low) and torch.equal(found[0].high, found[1].high)


def test_jumps_are_the_first_of_equals_and_never_the_base() -> None:
    keys = torch.zeros(1, 100, 16)
    keys[0, :, 0] = torch.randint(0, 4, (100,), generator=torch.Generator().manual_seed(0)).float()
    queries = torch.zeros(4, 1, 16)
    queries[2, 0, 0] = 1.0
    base = torch.tensor([[3, 63, 64, 70]])
    with backend.use("reference"):
        pages = KeySummaries(1, 2)  # pages of one key: codes are exact
        pages.update(keys)
        wanted = [pages.jumps(queries, base, 75, budget, 1.0) for budget in (0, 1, 20, 71)]
    with backend.use("triton"):
        found = [pages.jumps(queries, base, 75, budget, 1.0) for budget in (0, 1, 20, 71)]
    assert all(torch.equal(*each) for each in zip(found, wanted, strict=True))


def test_many_rows_are_served() -> None:
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(1, 70, 16, generator=generator)
    queries = torch.randn(5, 20, 16, generator=generator)  # more than one tile
    pages, base = coded(keys, 16, 8), torch.zeros(1, 0, dtype=torch.long)
    found = []
    for name in ("reference", "triton"):
        with backend.use(name):
            jumps = code_jumps(queries, pages.keys_coded, base, 70, 9, scaling=1.0)
            found.append((pages.logits(queries, 0.5), jumps))
    torch.testing.assert_close(found[1][0], found[0][0], atol=2e-5, rtol=2e-5)
    assert torch.equal(found[1][1], found[0][1])
