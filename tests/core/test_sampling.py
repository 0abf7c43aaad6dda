"""Drawing tokens: greedy by default, within the nucleus, repeatable, and never from numbers that are none."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loopserve.core.engine.sampling import Sampler, SamplingConfig
from loopserve.core.errors import ModelError

LOGITS = torch.tensor([0.0, 3.0, 1.0, 3.0, -2.0])


def test_greedy_takes_the_lowest_of_equals() -> None:
    assert Sampler(SamplingConfig())(LOGITS) == 1


@pytest.mark.parametrize(
    "extreme", [{"temperature": 1e-45}, {"temperature": 1e-300}, {"temperature": 1.0, "top_p": 1e-300}]
)
def test_extreme_options_draw_the_likeliest(extreme: dict[str, float]) -> None:
    assert Sampler(SamplingConfig(seed=0, **extreme))(LOGITS) in (1, 3)
    with pytest.raises(ValueError, match="seed"):
        SamplingConfig(seed=2**70)


@given(st.integers(0, 10_000))
def test_draws_are_repeatable_and_inside_what_was_asked(seed: int) -> None:
    config = SamplingConfig(temperature=2.0, top_k=3, seed=seed)
    drawn = [Sampler(config)(LOGITS) for _ in range(2)]
    assert drawn[0] == drawn[1] and drawn[0] in {1, 3, 2}
    assert Sampler(SamplingConfig(temperature=0.5, top_p=0.4, seed=seed))(LOGITS) == 1


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_are_named(temperature: float) -> None:
    with pytest.raises(ModelError, match="not numbers"):
        Sampler(SamplingConfig(temperature=temperature))(torch.tensor([0.0, float("nan")]))
