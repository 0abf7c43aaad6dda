"""Codes of keys: what they say of logits, and which columns they bring."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from loopserve.core.kv.key_summaries import KeySummaries
from loopserve.kernels import backend
from loopserve.kernels.key_codes import code_jumps, code_threshold, log_weights, unpack
from tests.kernels.cases import IMPLEMENTATIONS


def coded(keys: Tensor, page: int, bits: int) -> KeySummaries:
    """Summaries taken in in three steps, so that pages are finished later and buffers grow."""
    pages = KeySummaries(page, bits)
    for end in (len(keys[0]) // 2, len(keys[0]) // 2 + 1, len(keys[0])):
        if end:
            pages.update(keys[:, :end])
    return pages


@given(
    total=st.sampled_from([1, 31, 64, 200]),
    page=st.sampled_from([1, 7, 16, 32]),
    bits=st.sampled_from([2, 4, 8]),
    dim=st.sampled_from([8, 16, 32, 64, 128, 256]),
    group=st.sampled_from([1, 2, 3, 4, 7]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 99),
)
@settings(max_examples=80)
def test_every_implementation_says_nearly_the_same(
    total: int, page: int, bits: int, dim: int, group: int, dtype: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    whole = torch.full((2, total + 3, dim), float("nan"), dtype=dtype)  # nothing behind the last key may be read
    whole[:, :total] = torch.randn(2, total, dim, generator=generator).to(dtype)
    keys, queries = whole[:, :total], torch.randn(2 * group, 1, dim, generator=generator).to(dtype)
    base = torch.stack([torch.randperm(total, generator=generator)[: total // 4].sort().values for _ in range(2)])
    exact = (queries.view(2, group, dim).float() @ keys.transpose(1, 2).float()) * 0.3
    found = {}
    for name in IMPLEMENTATIONS:
        with backend.use(name):
            pages = coded(keys, page, bits)
            observed = torch.zeros(2, total)
            jumps = pages.jumps(queries, base, total, total // 3, 0.3, observed)
            found[name] = pages.low, pages.high, pages.logits(queries, 0.3), observed
        assert jumps.shape == (2, total // 4 + total // 3) and (jumps.diff(dim=1) > 0).all()
        assert all(set(head.tolist()) <= set(chosen.tolist()) for head, chosen in zip(base, jumps, strict=True))
    wanted = found["reference"]
    # Steps are rounded to 8 bits beside codes of 2, to 16 beside finer ones.
    tolerance = {2: 0.04, 4: 4e-4, 8: 4e-4}[bits] * float(wanted[2].abs().max() + 1e-6)
    for low, high, logits, observed in found.values():
        assert torch.equal(low, wanted[0]) and torch.equal(high, wanted[1])
        torch.testing.assert_close(logits, wanted[2], atol=tolerance, rtol=0)
        torch.testing.assert_close(observed.sum(1), torch.ones(2), atol=1e-4, rtol=0)
    step = float((wanted[1].float() - wanted[0].float()).max()) / (2**bits - 1)
    if bits == 2 and total >= page > 1:  # bounds are fitted: keys beyond them are off by at most half of the range
        step *= 3
    assert (wanted[2] - exact).abs().max() <= 0.3 * step * float(queries.float().abs().sum(-1).max()) / 2 + 1e-3


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_whole_pages_of_two_bits_are_fitted(implementation: str, dtype: torch.dtype) -> None:
    """A page with an odd key codes the others by smaller steps; one that may still grow keeps its whole range."""
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(2, 80, 32, generator=generator).to(dtype)
    keys[:, 5] *= 6.0
    errors, ranges = {}, {}
    for bits in (2, 4):
        with backend.use(implementation):
            pages = coded(keys, 32, bits)
        low, high = pages.low.float(), pages.high.float()
        step = (high - low)[:, :, None] / (2**bits - 1)
        decoded = (unpack(pages.codes, bits) * step + low[:, :, None]).flatten(1, 2)[:, :80]
        errors[bits], ranges[bits] = (decoded - keys.float()).square(), high - low
    whole = ranges[4][:, :2].square() / 9 / 12  # mean squared error of steps over the whole range
    assert errors[2][:, :64].mean() < 0.75 * whole.mean()
    assert (ranges[2][:, :2] <= ranges[4][:, :2]).all() and (ranges[2][:, 0] < ranges[4][:, 0]).float().mean() > 0.5
    assert torch.equal(ranges[2][:, 2], ranges[4][:, 2])  # 16 keys of the third page: whole later


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_jumps_are_the_best_free_columns_before_the_tail(implementation: str) -> None:
    keys = torch.zeros(1, 6, 16)
    keys[0, :, 0] = torch.tensor([0.0, 3.0, 1.0, 2.0, 2.0, 9.0])
    query = torch.zeros(1, 1, 16)
    query[0, 0, 0] = 1.0
    with backend.use(implementation):
        pages = KeySummaries(1, 2)  # pages of one key: codes are exact
        pages.update(keys)
        base = torch.tensor([[1]])
        assert pages.jumps(query, base, 5, 1, 1.0).tolist() == [
            [1, 3]
        ]  # of equals the first, never the base or the tail
        assert pages.jumps(query, base, 5, 3, 1.0).tolist() == [[1, 2, 3, 4]]
        assert pages.jumps(query, base[:, :0], 5, 0, 1.0).tolist() == [[]]


@given(
    total=st.sampled_from([40, 64, 200]),
    page=st.sampled_from([1, 16, 32]),
    bits=st.sampled_from([2, 4, 8]),
    group=st.sampled_from([1, 3, 5]),
    threshold=st.sampled_from([-20.0, -6.0, -4.0, 0.0]),
    bounds=st.sampled_from([(0, 0), (0, 20), (3, 9), (5, 5)]),
    seed=st.integers(0, 99),
)
@settings(max_examples=60)
def test_heavy_columns_reach_the_weight_within_the_bounds(
    total: int, page: int, bits: int, group: int, threshold: float, bounds: tuple[int, int], seed: int
) -> None:
    """By the weights of the same implementation: those of at least the threshold, the best first, and the base."""
    generator = torch.Generator().manual_seed(seed)
    keys, queries = torch.randn(2, total, 32, generator=generator), torch.randn(2 * group, 1, 32, generator=generator)
    base = torch.stack([torch.randperm(total - 5, generator=generator)[:10].sort().values for _ in range(2)])
    tail, (least, most) = total - 5, bounds
    for name in IMPLEMENTATIONS:
        with backend.use(name):
            pages, observed, jumped = coded(keys, page, bits), torch.zeros(2, tail), torch.zeros(2, tail)
            found, counts = pages.heavy(
                queries, base, tail, threshold, least, most, scaling=0.5, softcap=None, observed=observed
            )
            pages.jumps(queries, base, tail, 1, 0.5, jumped)
            weights = log_weights(pages.logits(queries, 0.5))[:, :tail]
        torch.testing.assert_close(observed, jumped)
        assert torch.equal(counts, (found >= 0).sum(1))
        assert found.shape[1] == int(counts.max())  # no wider than its longest head
        for head, row in enumerate(found.tolist()):
            chosen = [column for column in row if column >= 0]
            assert row == [-1] * (len(row) - len(chosen)) + sorted(set(chosen))
            others = set(chosen) - set(base[head].tolist())
            assert set(base[head].tolist()) <= set(chosen) and least <= len(others) <= most
            left = set(range(tail)) - set(chosen)
            lightest = min((float(weights[head, column]) for column in others), default=float("inf"))
            heaviest = max((float(weights[head, column]) for column in left), default=-float("inf"))
            assert lightest >= heaviest - 1e-4
            assert len(others) == least or lightest >= threshold - 1e-4
            assert len(others) == most or heaviest < threshold + 1e-4


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_heavy_columns_are_of_one_softmax_per_query(implementation: str) -> None:
    """One query head looks at one key, the other at all alike: only the first has a pair of more than an eighth."""
    keys = torch.zeros(1, 16, 16)
    keys[0, 5, 0] = 1.0
    queries = torch.zeros(2, 1, 16)
    queries[0, 0, 0] = 8.0
    with backend.use(implementation):
        pages = KeySummaries(1, 2)  # pages of one key: codes are exact
        pages.update(keys)
        base, options = torch.tensor([[3]]), {"scaling": 1.0}
        eighth = -2.0794
        assert pages.heavy(queries, base, 15, eighth, 0, 9, **options)[0].tolist() == [[3, 5]]
        assert pages.heavy(queries, base, 15, eighth, 2, 9, **options)[0].tolist() == [[0, 3, 5]]  # of equals the first
        assert pages.heavy(queries, base, 15, -9.0, 0, 3, **options)[0].tolist() == [[0, 1, 3, 5]]
        assert pages.heavy(queries, base[:, :0], 15, -9.0, 0, 0, **options)[0].tolist() == [[]]
        capped, _ = pages.heavy(queries, base, 15, eighth, 0, 9, softcap=0.1, **options)
        assert capped.tolist() == [[3]]


def test_what_does_not_fit_is_named() -> None:
    pages = KeySummaries(4, 2)
    pages.update(torch.randn(1, 6, 16))
    codes, query = pages.keys_coded, torch.zeros(1, 1, 16)
    with pytest.raises(ValueError, match="6 more than"):
        code_jumps(query, codes, torch.tensor([[0]]), 6, 6, scaling=1.0)
    with pytest.raises(ValueError, match="code_threshold: 6 more than"):
        code_threshold(query, codes, torch.tensor([[0]]), 6, -3.0, 0, 6, scaling=1.0)
    with pytest.raises(ValueError, match="at least 3 and at most 2"):
        code_threshold(query, codes, torch.tensor([[0]]), 6, -3.0, 3, 2, scaling=1.0)
    with pytest.raises(ValueError, match="observed"):
        code_jumps(query, codes, torch.tensor([[0]]), 6, 1, scaling=1.0, observed=torch.zeros(1, 5))
    with pytest.raises(ValueError, match="queries"):
        pages.logits(torch.zeros(1, 1, 8), 1.0)
