"""Few rows times a weight matrix: right within bfloat16's rounding, whatever the sizes, and the same beside other rows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from loopserve.kernels import backend
from loopserve.kernels.linear import linear
from loopserve.kernels.native.linear import MOST_ROWS
from tests.kernels.cases import IMPLEMENTATIONS


def drawn(seed: int, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32).to(dtype)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@given(
    rows=st.integers(0, MOST_ROWS + 2),
    size=st.integers(1, 150),
    outputs=st.integers(1, 70),
    bias=st.booleans(),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
)
def test_products_are_right(
    implementation: str, rows: int, size: int, outputs: int, bias: bool, dtype: torch.dtype
) -> None:
    inputs, weight = drawn(1, rows, size, dtype=dtype), drawn(2, outputs, size, dtype=dtype)
    added = drawn(3, outputs, dtype=dtype) if bias else None
    with backend.use(implementation):
        found = linear(inputs, weight, added)
    wanted = inputs.double() @ weight.double().T + (added.double() if added is not None else 0)
    rounding = 2**-8 if dtype is torch.bfloat16 else 2**-20
    assert found.dtype is dtype and found.shape == (rows, outputs)
    torch.testing.assert_close(found.double(), wanted, rtol=rounding, atol=1e-4 * size**0.5)


@pytest.mark.skipif("cpu" not in IMPLEMENTATIONS, reason="no compiled kernels here")
@pytest.mark.parametrize(("size", "outputs"), [(64, 48), (77, 37), (5, 16)])
def test_a_row_does_not_depend_on_the_others(size: int, outputs: int) -> None:
    inputs, weight, bias = drawn(1, MOST_ROWS, size), drawn(2, outputs, size), drawn(3, outputs)
    with backend.use("cpu"):
        alone = torch.cat([linear(row[None], weight, bias) for row in inputs])
        for rows in range(1, MOST_ROWS + 1):
            assert torch.equal(linear(inputs[:rows], weight, bias), alone[:rows])
        spread = drawn(1, MOST_ROWS, 2 * size)[:, ::2]  # a view
        assert torch.equal(linear(spread, weight), linear(spread.clone(), weight))
        assert torch.equal(linear(inputs.view(2, -1, 1, size), weight, bias).view(MOST_ROWS, -1), alone)


def test_threads_share_the_outputs() -> None:
    inputs, weight, before = drawn(1, 3, 256), drawn(2, 1037, 256), torch.get_num_threads()
    alone = linear(inputs, weight)
    try:
        torch.set_num_threads(3)
        assert torch.equal(linear(inputs, weight), alone)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_what_is_no_number_stays_none_and_stays_in_its_row(implementation: str) -> None:
    inputs, weight = drawn(1, 3, 40), drawn(2, 32, 40)
    inputs[1, 7] = float("nan")
    with backend.use(implementation):
        found = linear(inputs, weight)
    assert found[1].isnan().all() and found[[0, 2]].isfinite().all()


@pytest.mark.parametrize(
    ("weight", "bias"),
    [
        (torch.zeros(16, 9, dtype=torch.bfloat16), None),
        (torch.zeros(8, dtype=torch.bfloat16), None),
        (torch.zeros(16, 8, dtype=torch.float32), None),
        (torch.zeros(16, 8, dtype=torch.bfloat16, device="meta"), None),
        (torch.zeros(16, 8, dtype=torch.bfloat16), torch.zeros(8, dtype=torch.bfloat16)),
        (torch.zeros(16, 8, dtype=torch.bfloat16), torch.zeros(16, dtype=torch.float32)),
    ],
)
def test_what_does_not_fit_is_refused(weight: Tensor, bias: Tensor | None) -> None:
    with pytest.raises(ValueError, match="linear: "):
        linear(drawn(1, 2, 8), weight, bias)
