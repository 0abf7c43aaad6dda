"""Attention over pairs in blocks equals that over one tensor, whatever serves it; blocks that do not fit are refused by name."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loopserve.kernels import backend
from loopserve.kernels.decode_attention import DecodeRequest, decode_attention, decode_attention_batch, reads_blocks
from loopserve.kernels.paged import Paged, gathered, until
from loopserve.kernels.vertical_slash import vertical_slash
from tests.kernels.blocks import LAYOUTS, in_blocks
from tests.kernels.cases import IMPLEMENTATIONS, Case, cases, make

layouts = st.sampled_from(LAYOUTS)


@given(cases(), st.sampled_from([1, 5, 16, 64]), layouts)
def test_rows_are_found_through_the_table(case: Case, size: int, layout: str) -> None:
    total = case.keys.shape[1]
    keys, values = in_blocks(case.keys, case.values, size, layout, case.generator)
    assert keys.shape == tuple(case.keys.shape) and keys.size == size
    for part, whole in zip((keys, values), (case.keys, case.values), strict=True):
        assert torch.equal(part.gathered().nan_to_num(), whole.nan_to_num())
        (half,) = gathered(until(part, total // 2))
        assert torch.equal(half.nan_to_num(), whole[:, : total // 2].nan_to_num())
        assert until(whole, total // 2).shape == (len(whole), total // 2, whole.shape[2])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@given(case=cases(most=120), layout=layouts)
def test_every_implementation_serves_blocks(implementation: str, case: Case, layout: str) -> None:
    shape = case.queries.shape[0], case.keys.shape[1]
    lines = case.bools(*shape), case.bools(*shape)
    paged = in_blocks(case.keys, case.values, 16, layout, case.generator)
    with backend.use(implementation):
        for found, wanted in (
            (vertical_slash(case.queries, *each, *lines, **case.options) for each in (paged, (case.keys, case.values))),
            (
                decode_attention(case.queries, *each, need_lse=True, **case.options)
                for each in (paged, (case.keys, case.values))
            ),
        ):
            torch.testing.assert_close(found, wanted, atol=3e-5, rtol=1e-4)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_batch_may_hold_both(implementation: str) -> None:
    case = make(1, 90, dim=16)
    columns = torch.arange(40).expand(2, -1)
    requests = [
        DecodeRequest(case.queries, *each, None, columns, 80)
        for each in (
            in_blocks(case.keys, case.values, 16, "NHD", case.generator),
            (case.keys, case.values),
            in_blocks(case.keys, case.values, 32, "HND", case.generator),
        )
    ]
    with backend.use(implementation):
        first, *others = [output for output, _ in decode_attention_batch(requests, scaling=0.3)]
    for each in others:
        torch.testing.assert_close(each, first, atol=3e-5, rtol=1e-4)


def test_only_triton_reads_blocks_in_place() -> None:
    case = make(1, 40, dim=16)
    assert not reads_blocks(*in_blocks(case.keys, case.values, 16, "NHD", case.generator))


def test_what_does_not_fit_is_refused_by_name() -> None:
    case = make(2, 40)
    keys, values = in_blocks(case.keys, case.values, 16, "packed", case.generator)
    other = replace(values, table=values.table.clone())
    wrong: dict[str, tuple[Paged | torch.Tensor, Paged | torch.Tensor]] = {
        "must both be tensors": (keys, case.values),
        "the same blocks": (keys, other),
        r"contiguous, and list 40 columns in blocks of 16": _with_table(keys, values, keys.table[:2]),
        r"must be int64, contiguous": _with_table(keys, values, keys.table.repeat_interleave(2)[::2]),
        r"block table must lie in \[0, 6\)": _with_table(keys, values, keys.table + 6),
        r"int32 \[5\] must be int64": _with_table(keys, values, keys.table.int()),
    }
    for said, (left, right) in wrong.items():
        with pytest.raises(ValueError, match=said):
            decode_attention(case.queries, left, right, scaling=1.0)
        with pytest.raises(ValueError, match=said):
            vertical_slash(case.queries, left, right, *[torch.ones(4, 40, dtype=torch.bool)] * 2, scaling=1.0)


def _with_table(keys: Paged, values: Paged, table: torch.Tensor) -> tuple[Paged, Paged]:
    return replace(keys, table=table), replace(values, table=table)
