"""The best columns: exact numbers, lowest index among equals, forced ones in, the same whoever chooses."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loopserve.kernels import backend
from loopserve.kernels.top_columns import top_columns
from tests.kernels.cases import IMPLEMENTATIONS


@given(
    total=st.sampled_from([1, 2, 17, 300, 5000]),
    share=st.floats(0.0, 1.2),
    sinks=st.integers(0, 5),
    recent=st.integers(0, 20),
    ties=st.booleans(),
    odd=st.sampled_from([None, float("nan"), float("inf"), float("-inf")]),
    filler=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=150)
def test_every_implementation_chooses_the_same(
    total: int, share: float, sinks: int, recent: int, ties: bool, odd: float | None, filler: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(3, total, generator=generator)
    if ties:
        scores = (scores * 2).round()
    if odd is not None:
        scores[torch.rand(3, total, generator=generator) < 0.2] = odd
    budget = int(share * total)
    first_valid = torch.randint(0, max(1, total - budget + 1), (3,), generator=generator) if filler else None
    found = []
    for name in IMPLEMENTATIONS:
        with backend.use(name):
            found.append(top_columns(scores, budget, sink_tokens=sinks, recent_window=recent, first_valid=first_valid))
    assert all(torch.equal(found[0], each) for each in found[1:])
    assert found[0].shape == (3, min(budget, total)) and (found[0].diff(dim=1) > 0).all()
    if first_valid is not None and budget and budget <= total:
        assert (found[0] >= first_valid[:, None]).all()


def test_by_hand() -> None:
    scores = torch.tensor([[5.0, 1.0, 7.0, 7.0, 0.0, 7.0]])
    assert top_columns(scores, 2).tolist() == [[2, 3]]
    assert top_columns(scores, 3, sink_tokens=2).tolist() == [[0, 1, 2]]
    assert top_columns(scores, 2, sink_tokens=3, recent_window=2).tolist() == [[4, 5]]


def test_nonsense_is_named() -> None:
    with pytest.raises(ValueError, match=r"must be \[H, n\]"):
        top_columns(torch.zeros(3), 1)
    with pytest.raises(ValueError, match="budget=-1"):
        top_columns(torch.zeros(1, 3), -1)
    with pytest.raises(ValueError, match="first_valid"):
        top_columns(torch.zeros(1, 3), 1, first_valid=torch.zeros(2, dtype=torch.long))
