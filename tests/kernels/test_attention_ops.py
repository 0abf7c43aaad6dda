"""Every fast path equals its readable reference, on odd shapes, views, padded heads, groups of query heads."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loopserve.kernels import backend
from loopserve.kernels.block_sparse import block_sparse
from loopserve.kernels.decode_attention import decode_attention
from loopserve.kernels.dense_attention import dense_attention
from loopserve.kernels.dense_attention.reference import masked_attention
from loopserve.kernels.gather_kv import gather_kv
from loopserve.kernels.vertical_slash import vertical_slash
from tests.kernels.cases import Case, cases, make


def both(function, *args: object, **options: object) -> None:  # type: ignore[no-untyped-def]
    """The implementation in force and the reference agree, log-sum-exp included."""
    with backend.use("reference"):
        wanted, wanted_lse = function(*args, **options)
    with backend.use("cpu"):
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


def test_a_row_that_sees_nothing_is_zero_not_nan() -> None:
    case = make(3, 8)
    none = torch.zeros(4, 8, dtype=torch.bool)
    for name in ("reference", "cpu"):
        with backend.use(name):
            output, lse = vertical_slash(case.queries, case.keys, case.values, none, none, scaling=1.0)
        assert (output == 0).all() and lse.isneginf().all()


@given(cases(), st.integers(0, 40))
def test_gathered_pairs_are_the_chosen_ones(case: Case, count: int) -> None:
    indices = torch.randint(0, case.keys.shape[1], (case.keys.shape[0], count), generator=case.generator)
    keys, values = gather_kv(case.keys, case.values, indices)
    for head, row in enumerate(indices):
        assert torch.equal(keys[head], case.keys[head][row]) and torch.equal(values[head], case.values[head][row])
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


@pytest.mark.parametrize("shape", [(4, 9, 8), (3, 2, 8), (4, 2, 7)])
def test_shapes_that_do_not_fit_are_named(shape: tuple[int, int, int]) -> None:
    case = make(2, 8)
    with pytest.raises(ValueError, match=r"dense_attention: .*queries"):
        dense_attention(torch.zeros(shape), case.keys, case.values, scaling=1.0)


def test_an_unknown_backend_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOOPSERVE_KERNELS", "cuda13")
    with pytest.raises(ValueError, match=r"'cuda13' is unknown \(known: auto, reference, cpu\)"):
        backend.chosen()


def test_masked_attention_is_softmax_by_hand() -> None:
    case = make(4, 4, kv_heads=1, group=1)
    mask = torch.ones(4, 4, dtype=torch.bool).tril()
    output, lse = masked_attention(case.queries, case.keys, case.values, mask, scaling=0.5, softcap=None)
    for row in range(4):
        weights = (case.queries[0, row] @ case.keys[0, : row + 1].T * 0.5).exp()
        torch.testing.assert_close(output[0, row], weights @ case.values[0, : row + 1] / weights.sum())
        torch.testing.assert_close(lse[0, row], weights.sum().log())
