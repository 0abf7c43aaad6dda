"""Every fast path equals its readable reference, on odd shapes, views, padded heads, groups of query heads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loopserve.kernels import backend
from loopserve.kernels.block_sparse import block_sparse
from loopserve.kernels.decode_attention import decode_attention
from loopserve.kernels.dense_attention import dense_attention
from loopserve.kernels.gather_kv import gather_kv
from loopserve.kernels.masked import masked_attention
from loopserve.kernels.vertical_slash import vertical_slash
from tests.kernels.cases import FAST, IMPLEMENTATIONS, Case, cases, make


def both(function: Callable[..., Any], *args: object, **options: object) -> None:
    """Every fast path and the reference agree, log-sum-exp included."""
    with backend.use("reference"):
        wanted, wanted_lse = function(*args, **options)
    for name in FAST:
        with backend.use(name):
            output, lse = function(*args, **options)
        torch.testing.assert_close(output, wanted, atol=2e-5, rtol=1e-4)
        assert not output.isnan().any()
        if lse is not None:
            torch.testing.assert_close(lse, wanted_lse, atol=2e-5, rtol=1e-4)


@given(cases(), st.booleans(), st.sampled_from([None, 1, 7, 1000]))
def test_dense_attention(case: Case, need_lse: bool, window: int | None) -> None:
    both(dense_attention, case.queries, case.keys, case.values, need_lse=need_lse, window=window, **case.options)


@given(cases(), st.data())
def test_dense_attention_of_rows_that_stand_anywhere(case: Case, data: st.DataObject) -> None:
    total = case.keys.shape[1]
    columns = torch.tensor(data.draw(st.lists(st.integers(0, total - 1), min_size=1, max_size=9)))
    queries = torch.randn(case.queries.shape[0], len(columns), case.queries.shape[2], generator=case.generator)
    both(dense_attention, queries, case.keys, case.values, columns=columns, **case.options)


@given(cases(), st.sampled_from([0.0, 0.02, 0.3, 1.0]), st.sampled_from([0.0, 0.02, 0.3, 1.0]))
def test_vertical_slash(case: Case, vertical_share: float, slash_share: float) -> None:
    lines = [
        case.bools(case.queries.shape[0], case.keys.shape[1], share=share) for share in (vertical_share, slash_share)
    ]
    both(vertical_slash, case.queries, case.keys, case.values, *lines, **case.options)


@given(cases(), st.sampled_from([1, 16, 64]), st.sampled_from([0.0, 0.3, 1.0]))
@settings(max_examples=50)
def test_block_sparse(case: Case, tile: int, share: float) -> None:
    heads, rows, total = case.queries.shape[0], case.queries.shape[1], case.keys.shape[1]
    blocks = case.bools(heads, -(-rows // tile), -(-total // tile), share=share)
    both(block_sparse, case.queries, case.keys, case.values, blocks, tile=tile, **case.options)


@given(cases())
def test_decode_attention_is_dense_over_the_active_set(case: Case) -> None:
    output, _ = decode_attention(case.queries, case.keys, case.values, **case.options)
    with backend.use("reference"):
        wanted, _ = dense_attention(case.queries, case.keys, case.values, **case.options)
    torch.testing.assert_close(output, wanted, atol=2e-5, rtol=1e-4)


@given(cases(), st.data())
def test_decode_attention_in_place(case: Case, data: st.DataObject) -> None:
    """Chosen columns and the tail, heads keeping different numbers."""
    heads, total = case.keys.shape[:2]
    if case.first_valid is not None:
        case.keys.nan_to_num_(0.0), case.values.nan_to_num_(0.0)
    tail = data.draw(st.integers(0, total - case.queries.shape[1]))
    kept = [data.draw(st.integers(0, tail)) for _ in range(heads)]
    columns = torch.full((heads, max(kept)), -1)
    for row, count in zip(columns, kept, strict=True):
        row[len(row) - count :] = torch.randperm(tail, generator=case.generator)[:count].sort().values
    options = {"scaling": case.scaling, "softcap": case.softcap, "need_lse": True}
    both(decode_attention, case.queries, case.keys, case.values, columns=columns, tail=tail, **options)


def test_columns_that_do_not_fit_are_named() -> None:
    case = make(2, 9)
    for columns, tail, message in [
        (torch.zeros(2, 3), 5, "columns torch.float32"),
        (torch.zeros(3, 3, dtype=torch.long), 5, "columns torch.int64 .3, 3."),
        (torch.zeros(2, 1, dtype=torch.long), 8, "tail=8"),
        (torch.tensor([[5], [4]]), 5, "columns must lie in .-1, 5"),
    ]:
        with pytest.raises(ValueError, match=message):
            decode_attention(case.queries, case.keys, case.values, scaling=1.0, columns=columns, tail=tail)


def test_a_row_that_sees_nothing_is_zero_not_nan() -> None:
    case = make(3, 8)
    none = torch.zeros(4, 8, dtype=torch.bool)
    for name in IMPLEMENTATIONS:
        with backend.use(name):
            output, lse = vertical_slash(case.queries, case.keys, case.values, none, none, scaling=1.0)
        assert (output == 0).all() and lse.isneginf().all()


@given(cases(), st.integers(0, 40))
def test_gathered_pairs_are_the_chosen_ones(case: Case, count: int) -> None:
    indices = torch.randint(0, case.keys.shape[1], (case.keys.shape[0], count), generator=case.generator)
    keys, values = gather_kv(case.keys, case.values, indices)
    for head, row in enumerate(indices):
        torch.testing.assert_close(keys[head], case.keys[head][row], rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(values[head], case.values[head][row], rtol=0, atol=0, equal_nan=True)
    assert keys.untyped_storage().data_ptr() != case.keys.untyped_storage().data_ptr()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_types_stay_what_they_are(dtype: torch.dtype) -> None:
    case = make(20, 70)
    parts = [tensor.to(dtype) for tensor in (case.queries, case.keys, case.values)]
    lines = case.bools(4, 70), case.bools(4, 70)
    exact, _ = vertical_slash(case.queries, case.keys, case.values, *lines, scaling=case.scaling)
    found, _ = vertical_slash(*parts, *lines, scaling=case.scaling)
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), exact, atol=0.1, rtol=0.05)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"queries": torch.zeros(4, 9, 8)}, "9 queries cannot be the last of 8 keys"),
        ({"queries": torch.zeros(3, 2, 8)}, "D must agree and Hkv divide Hq"),
        ({"queries": torch.zeros(4, 2, 7)}, "D must agree and Hkv divide Hq"),
        ({"queries": torch.zeros(4, 0, 8)}, "must be non-empty"),
        ({"queries": torch.zeros(4, 2, 8, dtype=torch.float64)}, "queries are torch.float64"),
        ({"values": torch.zeros(2, 7, 8)}, "values .* do not fit keys"),
        ({"columns": torch.tensor([3, 8])}, r"columns must lie in \[0, 8\)"),
        ({"columns": torch.tensor([3])}, r"2 rows need int64 columns \[2\]"),
        ({"first_valid": torch.tensor([0])}, "first_valid"),
        ({"window": 0}, "window=0"),
    ],
)
def test_inputs_that_do_not_fit_are_named(change: dict[str, Any], message: str) -> None:
    case = make(2, 8)
    inputs = {"queries": case.queries, "keys": case.keys, "values": case.values, "scaling": 1.0, **change}
    with pytest.raises(ValueError, match=f"dense_attention: .*{message}"):
        dense_attention(**inputs)


def test_lines_blocks_and_indices_that_do_not_fit_are_named() -> None:
    case = make(2, 8)
    lines = torch.zeros(4, 8, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"slashes must be bool \[4, 8\]"):
        vertical_slash(case.queries, case.keys, case.values, lines, lines[:, 1:], scaling=1.0)
    with pytest.raises(ValueError, match="blocks must be bool"):
        block_sparse(case.queries, case.keys, case.values, lines, scaling=1.0)
    for column in (-1, 8):
        with pytest.raises(ValueError, match=r"indices must lie in \[0, 8\)"):
            gather_kv(case.keys, case.values, torch.tensor([[0], [column]]))


@pytest.mark.parametrize("total", [1, 63, 64, 65, 111, 257])
@pytest.mark.parametrize("group", [1, 4, 7])
def test_odd_lengths(total: int, group: int) -> None:
    for rows in {1, total, (total + 1) // 2}:
        case = make(rows, total, group=group, seed=total)
        lines = case.bools(2 * group, total, share=0.1), case.bools(2 * group, total, share=0.1)
        both(dense_attention, case.queries, case.keys, case.values, need_lse=True, **case.options)
        both(vertical_slash, case.queries, case.keys, case.values, *lines, **case.options)
        blocks = case.bools(2 * group, -(-rows // 64), -(-total // 64), share=0.3)
        both(block_sparse, case.queries, case.keys, case.values, blocks, **case.options)


def test_long_blocks_take_every_branch() -> None:
    """Several steps of tiles, tall tiles for a wide band, a tail shorter than a tile, heads with one kind of line or
    all.
    """
    case = make(1100, 1900, group=3, kv_heads=2, seed=5)
    verticals, slashes = case.bools(6, 1900, share=0.02), torch.zeros(6, 1900, dtype=torch.bool)
    slashes[:, :700] = True
    slashes[1:, 100:690] = False
    slashes[2] = case.bools(1900, share=0.01)
    verticals[3], slashes[4] = False, False
    slashes[5] = True
    both(vertical_slash, case.queries, case.keys, case.values, verticals, slashes, **case.options)


def test_values_of_another_size_than_keys() -> None:
    case = make(20, 70)
    values = torch.randn(2, 70, 5, generator=case.generator)
    lines = case.bools(4, 70), case.bools(4, 70)
    both(dense_attention, case.queries, case.keys, values, scaling=0.3, need_lse=True)
    both(vertical_slash, case.queries, case.keys, values, *lines, scaling=0.3)
    both(block_sparse, case.queries, case.keys, values, case.bools(4, 1, 2, share=0.5), scaling=0.3)


def test_transposed_views() -> None:
    """The fused kernel reads a view wrongly when its last dimension is strided, so none may reach it."""
    case = make(30, 90)
    queries, keys, values = (
        part.transpose(1, 2).contiguous().transpose(1, 2) for part in (case.queries, case.keys, case.values)
    )
    lines = case.bools(4, 90), case.bools(4, 90)
    both(dense_attention, queries, keys, values, scaling=0.3, need_lse=True)
    both(vertical_slash, queries, keys, values, *lines, scaling=0.3)
    both(block_sparse, queries, keys, values, case.bools(4, 1, 2, share=0.5), scaling=0.3)


def test_log_sum_exps_come_on_request_only() -> None:
    case = make(2, 9)
    assert dense_attention(case.queries, case.keys, case.values, scaling=1.0)[1] is None
    assert decode_attention(case.queries, case.keys, case.values, scaling=1.0)[1] is None


def test_masked_attention_is_softmax_by_hand() -> None:
    case = make(4, 4, kv_heads=1, group=1)
    mask = torch.ones(4, 4, dtype=torch.bool).tril()
    output, lse = masked_attention(case.queries, case.keys, case.values, mask, scaling=0.5, softcap=None)
    for row in range(4):
        weights = (case.queries[0, row] @ case.keys[0, : row + 1].T * 0.5).exp()
        torch.testing.assert_close(output[0, row], weights @ case.values[0, : row + 1] / weights.sum())
        torch.testing.assert_close(lse[0, row], weights.sum().log())
