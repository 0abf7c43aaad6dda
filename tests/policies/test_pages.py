"""Page summaries: kept up to date, true bounds, empty in a copy."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loopserve.core.kv.key_summaries import CODE_BITS, KeySummaries
from loopserve.kernels.key_codes import encode, fitted, page_bounds, unpack


@given(
    page=st.integers(1, 9),
    bits=st.sampled_from(CODE_BITS),
    steps=st.lists(st.integers(0, 20), min_size=1, max_size=8),
    seed=st.integers(0, 99),
)
def test_growing_step_by_step_equals_doing_it_at_once(page: int, bits: int, steps: list[int], seed: int) -> None:
    total = sum(steps) + 1
    source = torch.Generator().manual_seed(seed)
    keys, queries = torch.randn(2, total, 8, generator=source), torch.randn(4, 1, 8, generator=source)
    growing = KeySummaries(page, bits)
    seen = 1
    for step in [0, *steps]:
        seen += step
        growing.update(keys[:, :seen])
        low, high = page_bounds(keys[:, :seen], page)
        if bits == 2:  # narrowed for smaller errors, page by page as pages are complete
            wide, (low, high) = (low, high), fitted(keys[:, :seen], low, high, page, bits)
            assert bool((low >= wide[0]).all()) and bool((high <= wide[1]).all())
        assert torch.equal(growing.low, low) and torch.equal(growing.high, high)
        assert growing.nbytes == 2 * low.numel() * 4 + 2 * seen * bits and growing.columns == seen
        if bits:
            at_once = KeySummaries(page, bits)
            at_once.update(keys[:, :seen])
            assert torch.equal(growing.logits(queries, 1.0), at_once.logits(queries, 1.0))


@pytest.mark.parametrize(("bits", "error"), [(8, 0.02), (4, 0.35), (2, 1.7)])
@pytest.mark.parametrize("group", [1, 2])
def test_codes_give_nearly_the_logits(bits: int, error: float, group: int) -> None:
    source = torch.Generator().manual_seed(0)
    keys, queries = torch.randn(2, 70, 16, generator=source), torch.randn(2 * group, 1, 16, generator=source)
    summaries = KeySummaries(32, bits)
    summaries.update(keys)
    exact = (queries.view(2, group, 16) @ keys.transpose(1, 2)).amax(1) / 4
    found = summaries.logits(queries, 0.25).amax(1)
    assert found.shape == exact.shape and 0 < float((found - exact).abs().max()) < error


def test_channels_of_equal_keys_are_coded_exactly() -> None:
    summaries = KeySummaries(8, 4)
    summaries.update(torch.full((1, 10, 4), 0.3))
    queries = torch.ones(1, 1, 4)
    assert torch.allclose(summaries.logits(queries, 1.0), torch.full((1, 1, 10), 1.2))


@given(bits=st.sampled_from([2, 4, 8]), seed=st.integers(0, 99))
def test_codes_survive_packing(bits: int, seed: int) -> None:
    keys = torch.randint(0, 2**bits, (2, 12, 8), generator=torch.Generator().manual_seed(seed)).float()
    low, high = torch.zeros(2, 3, 8), torch.full((2, 3, 8), float(2**bits - 1))
    packed = encode(keys, low, high, 4, bits)
    assert packed.dtype == torch.uint8 and packed.shape == (2, 3, 4, bits)
    assert torch.equal(unpack(packed, bits).view(2, 12, 8).float(), keys)


@pytest.mark.parametrize(("page", "bits"), [(0, 0), (4, 3), (4, 16)])
def test_nonsense_is_refused(page: int, bits: int) -> None:
    with pytest.raises(ValueError, match="KeySummaries"):
        KeySummaries(page, bits)
    with pytest.raises(ValueError, match="channels"):
        KeySummaries(4, 4).update(torch.zeros(1, 4, 3))


@pytest.mark.parametrize("group", [1, 2, 4])
def test_scores_bound_every_logit_of_the_page(group: int) -> None:
    source = torch.Generator().manual_seed(0)
    keys, queries = torch.randn(2, 37, 8, generator=source), torch.randn(2 * group, 1, 8, generator=source)
    summaries = KeySummaries(5)
    summaries.update(keys)
    bounds = summaries.scores(queries, 0.5)
    logits = (queries.view(2, group, 8) @ keys.transpose(1, 2) * 0.5).amax(1)
    for page in range(8):
        assert (bounds[:, page, None] >= logits[:, page * 5 : page * 5 + 5] - 1e-5).all()


def test_a_shorter_store_is_summarised_afresh_and_a_copy_starts_empty() -> None:
    keys = torch.randn(1, 40, 4)
    summaries = KeySummaries(4)
    summaries.update(keys)
    other = copy.deepcopy(summaries)
    assert other.columns == 0 and other.page == 4
    other.update(keys + 1)
    assert torch.equal(summaries.low + 1, other.low)
    summaries.update(keys[:, 20:] * 2)
    assert torch.equal(summaries.low, page_bounds(keys[:, 20:] * 2, 4)[0])


def test_an_empty_summary_says_so() -> None:
    assert KeySummaries(4).pages == 0
    with pytest.raises(AssertionError, match="update"):
        _ = KeySummaries(4).low
