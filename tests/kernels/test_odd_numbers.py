"""Numbers that are not finite never keep a selection from ending, and never get it out of range."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from loopserve.kernels import backend
from loopserve.kernels.decode_attention import decode_attention
from loopserve.kernels.dense_attention import dense_attention
from loopserve.kernels.select_lines import select_lines
from tests.kernels.cases import IMPLEMENTATIONS, make

_LONGEST = 300  # seconds; far more than it takes, so that only what does not end is ended


@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, "triton"])
def test_every_selection_ends_and_is_valid(implementation: str) -> None:
    if implementation == "triton":
        pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.odd_numbers", implementation],
        env=os.environ | ({"TRITON_INTERPRET": "1"} if implementation == "triton" else {}),
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=_LONGEST,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), -1.0])
def test_weights_must_be_finite(weight: float) -> None:
    weights = torch.tensor([1.0, weight, 1.0])
    with pytest.raises(ValueError, match="finite and none negative"):
        select_lines(torch.zeros(2, 3, 9), torch.tensor([4, 6, 8]), 5, alpha=0.9, row_weights=weights)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("part", ["queries", "keys"])
def test_numbers_that_are_none_are_not_hidden(implementation: str, part: str) -> None:
    """A model whose weights are damaged must be noticed: NaN in a query or in an attended key reaches the output."""
    case = make(40, 200, seed=3)
    given = {name: getattr(case, name).clone() for name in ("queries", "keys", "values")}
    given[part][0, 5, 0] = float("nan")
    scaling = given["queries"].shape[-1] ** -0.5
    with backend.use(implementation):
        for function in (dense_attention, decode_attention):
            output, _ = function(given["queries"], given["keys"], given["values"], scaling=scaling)
            assert bool(output.isnan().any()), function.__name__
