"""Compiled kernels read memory by address: what they would read amiss is refused before they are called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from loopserve.core.kv.key_summaries import KeySummaries
from loopserve.kernels.block_sparse import block_sparse
from loopserve.kernels.decode_attention import decode_attention
from loopserve.kernels.dense_attention import dense_attention
from loopserve.kernels.gather_kv import gather_kv
from loopserve.kernels.key_codes import code_jumps, code_threshold
from loopserve.kernels.select_lines import select_lines
from loopserve.kernels.token_scores import token_scores
from loopserve.kernels.top_columns import top_columns
from loopserve.kernels.vertical_slash import vertical_slash

FAR = 10**12
QUERIES, KEYS = torch.randn(2, 3, 16), torch.randn(1, 40, 16)
ONE = torch.randn(2, 1, 16)


def lines(**to: Any) -> torch.Tensor:
    return torch.ones(2, 40, dtype=torch.bool).to(**to)


def codes() -> Any:
    pages = KeySummaries(8, 2)
    pages.update(torch.randn(1, 40, 64))
    return pages.keys_coded


def jumps(base: torch.Tensor, **options: Any) -> torch.Tensor:
    return code_jumps(torch.randn(2, 1, 64), codes(), base, 32, 2, scaling=0.1, **options)


def heavy(base: torch.Tensor, **options: Any) -> object:
    return code_threshold(torch.randn(2, 1, 64), codes(), base, 32, -3.0, 0, 2, scaling=0.1, **options)


@pytest.mark.parametrize(
    "call",
    [
        lambda: vertical_slash(QUERIES, KEYS, KEYS, lines(device="meta"), lines(), scaling=1.0),
        lambda: vertical_slash(QUERIES, KEYS, KEYS, lines(), lines(dtype=torch.uint8), scaling=1.0),
        lambda: block_sparse(
            QUERIES, KEYS, KEYS, torch.ones(2, 1, 1, dtype=torch.bool, device="meta"), tile=64, scaling=1.0
        ),
        lambda: decode_attention(ONE, KEYS, KEYS, scaling=1.0, columns=torch.tensor([[0, FAR]]), tail=30),
        lambda: decode_attention(ONE, KEYS, KEYS, scaling=1.0, columns=torch.tensor([[-FAR, 3]]), tail=30),
        lambda: decode_attention(ONE, KEYS, KEYS, scaling=1.0, columns=torch.tensor([[0]], device="meta"), tail=30),
        lambda: decode_attention(ONE, KEYS, KEYS, scaling=1.0, first_valid=torch.tensor([-FAR])),
        lambda: dense_attention(QUERIES, KEYS, KEYS, scaling=1.0, first_valid=torch.tensor([FAR])),
        lambda: dense_attention(QUERIES, KEYS, KEYS, scaling=1.0, first_valid=torch.tensor([1.0])),
        lambda: dense_attention(QUERIES, KEYS, KEYS, scaling=1.0, first_valid=torch.tensor([1], device="meta")),
        lambda: token_scores(QUERIES, KEYS, torch.tensor([0, 1, FAR]), scaling=1.0),
        lambda: token_scores(QUERIES, KEYS, torch.arange(3, device="meta"), scaling=1.0),
        lambda: gather_kv(KEYS, KEYS.to("meta"), torch.tensor([[0]])),
        lambda: select_lines(torch.zeros(1, 3, 9), torch.arange(3), 3, alpha=0.9, row_weights=torch.ones(3).to("meta")),
        lambda: gather_kv(KEYS, KEYS, torch.tensor([[FAR]])),
        lambda: gather_kv(KEYS, KEYS, torch.tensor([[-1]])),
        lambda: gather_kv(KEYS, KEYS, torch.tensor([[0]], device="meta")),
        lambda: top_columns(torch.randn(1, 9), 3, first_valid=torch.tensor([FAR])),
        lambda: top_columns(torch.randn(1, 9), 3, first_valid=torch.tensor([1.0])),
        lambda: jumps(torch.tensor([[FAR]])),
        lambda: jumps(torch.tensor([[-1]])),
        lambda: jumps(torch.tensor([[0]], device="meta")),
        lambda: heavy(torch.tensor([[FAR]])),
        lambda: heavy(torch.tensor([[0]], device="meta")),
        lambda: jumps(torch.tensor([[0]]), observed=torch.zeros(1, 1).expand(1, 32)),
    ],
)
def test_what_could_be_read_amiss_is_refused(call: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=r"must (lie|be)|are on|got"):
        call()


def test_jumps_from_a_base_that_fits() -> None:
    assert jumps(torch.tensor([[0, 31]])).shape == (1, 4)


def test_filler_in_the_midst_of_columns_is_not_read_before_the_buffer() -> None:
    """It has no meaning, so only that it stays inside is asked: keys before the buffer are not numbers here."""
    around = torch.full((3, 40, 16), float("nan"))
    around[1] = KEYS[0]
    keys = around[1:2]
    output, _ = decode_attention(ONE, keys, keys, scaling=1.0, columns=torch.tensor([[-1, 3, -1, 7]]), tail=39)
    assert not output.isnan().any()
