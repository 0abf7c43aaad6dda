"""Every Triton kernel equals its reference, run by Triton's interpreter. Started by ``test_interpreted``, in a process
of its own: interpreting must be chosen before a kernel is imported, and then nothing can be compiled.

Splitting and packing thresholds are lowered so that short inputs take every path. bfloat16 is left out: the interpreter
multiplies its raw bits.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from loopserve.kernels import backend
from loopserve.kernels.block_sparse import block_sparse
from loopserve.kernels.decode_attention import DecodeRequest, decode_attention, decode_attention_batch
from loopserve.kernels.dense_attention import dense_attention
from loopserve.kernels.gather_kv import gather_kv
from loopserve.kernels.line_scores import line_scores
from loopserve.kernels.token_scores import token_scores
from loopserve.kernels.vertical_slash import vertical_slash
from tests.kernels.cases import Case, make

assert os.environ.get("TRITON_INTERPRET") == "1"
few = settings(max_examples=8)
shares = st.sampled_from([0.0, 0.03, 0.4, 1.0])


@pytest.fixture(autouse=True, scope="module")
def short_inputs_take_every_path() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("loopserve.kernels.gpu.work._LEAST_PART", 1)
        patch.setattr("loopserve.kernels.gpu.scores._LEAST_KEYS", 32)
        patch.setattr("loopserve.kernels.gpu.work._BLOCK", 128)
        patch.setattr("loopserve.kernels.gpu.decode_attention._LEAST_KEYS", 32)
        patch.setattr("loopserve.kernels.gpu.vertical_slash._LEAST_PACKED", 32)
        yield


@st.composite
def short(draw: st.DrawFn, most: int = 130) -> Case:
    total = draw(st.one_of(st.sampled_from([1, 63, 64, 65, 111]), st.integers(1, most)))
    case = make(
        draw(st.one_of(st.just(1), st.just(total), st.integers(1, total))),
        total,
        group=draw(st.sampled_from([1, 4, 7])),
        kv_heads=draw(st.sampled_from([1, 2])),
        dim=draw(st.sampled_from([8, 16, 24])),
        seed=draw(st.integers(0, 1000)),
        filler=draw(st.booleans()),
        softcap=draw(st.sampled_from([None, 5.0])),
    )
    return in_half(case) if draw(st.booleans()) else case


def in_half(case: Case) -> Case:
    parts = (each.half() for each in (case.queries, case.keys, case.values))
    return Case(*parts, case.first_valid, case.softcap, case.generator)


def equal(function: Callable[..., Any], *args: Any, **options: Any) -> None:
    """Triton and the reference agree, in all that is returned."""
    with backend.use("reference"):
        wanted = function(*args, **options)
    with backend.use("triton"):
        found = function(*args, **options)
    if isinstance(wanted, Tensor):
        wanted, found = (wanted,), (found,)
    half = args[0].dtype == torch.float16
    for each, right in zip(found, wanted, strict=True):
        assert (each is None) == (right is None)
        if each is not None:
            assert each.dtype == right.dtype and not each.isnan().any()
            torch.testing.assert_close(each, right, atol=1e-2 if half else 3e-5, rtol=1e-2 if half else 1e-4)


def lines(case: Case, vertical: float, slash: float) -> tuple[Tensor, Tensor]:
    """Lines drawn at random; the first head gets a band, the last all slashes of one half."""
    shape = case.queries.shape[0], case.keys.shape[1]
    verticals, slashes = case.bools(*shape, share=vertical), case.bools(*shape, share=slash)
    if slash:
        slashes[0, : shape[1] // 2] = True
        slashes[-1] = False
        slashes[-1, shape[1] // 2 :] = True
    return verticals, slashes


@given(short(), shares, shares)
@settings(max_examples=16)
def test_attention_on_lines(case: Case, vertical: float, slash: float) -> None:
    equal(vertical_slash, case.queries, case.keys, case.values, *lines(case, vertical, slash), **case.options)


@pytest.mark.parametrize("half", [False, True])
def test_attention_on_lines_whose_chunks_overlap(half: bool) -> None:
    """The last chunk of a run of keys reaches into the next run, which counts those cells itself."""
    case = make(100, 300, group=1, kv_heads=1)
    slashes = torch.zeros(1, 300, dtype=torch.bool)
    tile = 64 if half else 32
    slashes[0, [3, 8, 8 + tile + 5, 200, 207]] = True
    part = in_half(case) if half else case
    none = torch.zeros_like(slashes)
    equal(vertical_slash, part.queries, part.keys, part.values, none, slashes, **part.options)


@pytest.mark.parametrize("group", [1, 4, 7])
def test_attention_on_lines_of_a_late_turn(group: int) -> None:
    case = in_half(make(20, 1000, group=group, kv_heads=1, dim=16, seed=group, filler=group == 4))
    equal(vertical_slash, case.queries, case.keys, case.values, *lines(case, 0.1, 0.02), **case.options)


@given(short(), st.sampled_from([16, 32, 64, 128]), shares)
@few
def test_attention_on_blocks(case: Case, tile: int, share: float) -> None:
    heads, rows, total = case.queries.shape[0], case.queries.shape[1], case.keys.shape[1]
    blocks = case.bools(heads, -(-rows // tile), -(-total // tile), share=share)
    equal(block_sparse, case.queries, case.keys, case.values, blocks, tile=tile, **case.options)


@given(short(), st.sampled_from([None, 1, 7, 100]), st.booleans())
@few
def test_attention_on_everything(case: Case, window: int | None, need_lse: bool) -> None:
    with backend.use("triton"):
        dense_attention(case.queries, case.keys, case.values, window=window, need_lse=need_lse, **case.options)
    equal(dense_attention, case.queries, case.keys, case.values, window=window, need_lse=True, **case.options)


@given(short(), st.data())
@few
def test_attention_of_rows_that_stand_anywhere(case: Case, data: st.DataObject) -> None:
    total = case.keys.shape[1]
    columns = torch.tensor(data.draw(st.lists(st.integers(0, total - 1), min_size=1, max_size=90)))
    queries = torch.randn(case.queries.shape[0], len(columns), case.queries.shape[2], generator=case.generator)
    queries = queries.to(case.keys.dtype)
    equal(dense_attention, queries, case.keys, case.values, columns=columns, need_lse=True, **case.options)


@given(short(), st.integers(1, 5))
@few
def test_attention_while_decoding(case: Case, rows: int) -> None:
    queries = case.queries[:, :rows]
    equal(decode_attention, queries, case.keys, case.values, need_lse=True, **case.options)


def test_attention_while_decoding_over_a_long_set() -> None:
    for group in (1, 4):
        case = in_half(make(2, 1000, group=group, dim=64, filler=True))
        equal(decode_attention, case.queries, case.keys, case.values, need_lse=True, **case.options)


def chosen_columns(case: Case, tail: int, kept: list[int]) -> Tensor:
    """So many columns below the tail per KV head, sorted, padded on the left as far as the longest."""
    columns = torch.full((len(kept), max(kept)), -1)
    for row, count in zip(columns, kept, strict=True):
        row[len(row) - count :] = torch.randperm(tail, generator=case.generator)[:count].sort().values
    return columns


@given(short(), st.integers(1, 24), st.data())
@settings(max_examples=16)
def test_attention_while_decoding_in_place(case: Case, rows: int, data: st.DataObject) -> None:
    """Chosen columns and the tail; what is in neither is never read."""
    queries, (heads, total) = case.queries[:, :rows], case.keys.shape[:2]
    if case.first_valid is not None:
        case.keys.nan_to_num_(0.0), case.values.nan_to_num_(0.0)
    tail = data.draw(st.integers(0, total - queries.shape[1]))
    columns = chosen_columns(case, tail, [data.draw(st.integers(0, tail)) for _ in range(heads)])
    options = {"scaling": case.scaling, "softcap": case.softcap, "need_lse": True, "columns": columns, "tail": tail}
    equal(decode_attention, queries, case.keys, case.values, **options)


@pytest.mark.parametrize(("rows", "kept", "tail"), [(1, [300, 0], 999), (3, [700, 411], 720), (12, [64, 64], 64)])
def test_attention_while_decoding_in_place_over_a_long_store(rows: int, kept: list[int], tail: int) -> None:
    """Parts that hold chosen columns only, both, the tail only, and filler only; more rows than a tile holds."""
    case = in_half(make(rows, 1000, group=7, dim=16))
    columns = chosen_columns(case, tail, kept)
    with backend.use("reference"):
        wanted = decode_attention(
            case.queries, case.keys, case.values, scaling=0.3, columns=columns, tail=tail, need_lse=True
        )
    for head, row in enumerate(columns):  # the reference reads everything, so what is not chosen is spoilt only now
        unused = torch.ones(1000, dtype=torch.bool)
        unused[row[row >= 0]] = unused[tail:] = False
        case.keys[head, unused] = case.values[head, unused] = float("nan")
    with backend.use("triton"):
        found = decode_attention(
            case.queries, case.keys, case.values, scaling=0.3, columns=columns, tail=tail, need_lse=True
        )
    for each, right in zip(found, wanted, strict=True):
        torch.testing.assert_close(each, right, atol=1e-2, rtol=1e-2)


def session(kind: str, rows: int, total: int, group: int, half: bool, seed: int) -> DecodeRequest:
    """A decode step over the whole store, a ragged copy or chosen columns of the store."""
    case = make(rows, max(rows, total), group=group, dim=16, seed=seed, filler=kind == "copy")
    case = in_half(case) if half else case
    if kind != "in place":
        return DecodeRequest(case.queries, case.keys, case.values, case.first_valid)
    tail = (case.keys.shape[1] - rows) // 2
    columns = chosen_columns(case, tail, [tail // 3, 0])
    return DecodeRequest(case.queries, case.keys, case.values, None, columns, tail)


@st.composite
def steps(draw: st.DrawFn) -> list[DecodeRequest]:
    """Decode steps of several sessions of one layer, of lengths, kinds and numbers of rows that differ."""
    group, half, same = draw(st.sampled_from([1, 4, 7])), draw(st.booleans()), draw(st.booleans())
    return [
        session(
            draw(st.sampled_from(["whole", "copy", "in place"])),
            1 if same else draw(st.integers(1, 4)),
            draw(st.integers(1, 150)),
            group,
            half,
            seed,
        )
        for seed in range(draw(st.integers(2, 4)))
    ]


@given(steps(), st.sampled_from([None, 5.0]))
@settings(max_examples=16)
def test_attention_while_decoding_many_sessions(requests: list[DecodeRequest], softcap: float | None) -> None:
    """Each is what the reference makes of it and, where all have one row, bit by bit what it is alone."""
    options = {"scaling": 0.3, "softcap": softcap, "need_lse": True}
    with backend.use("triton"):
        found = decode_attention_batch(requests, **options)
    for (queries, keys, values, first_valid, columns, tail), each in zip(requests, found, strict=True):
        own = options | {"first_valid": first_valid, "columns": columns, "tail": tail}
        equal(decode_attention, queries, keys, values, **own)
        with backend.use("triton"):
            alone = decode_attention(queries, keys, values, **own)
        together = all(other.queries.shape[1] == 1 for other in requests)
        loose = 1e-2 if queries.dtype == torch.float16 else 3e-5
        tolerance = {"atol": 0.0, "rtol": 0.0} if together else {"atol": loose, "rtol": loose}
        torch.testing.assert_close(each, alone, **tolerance)


def test_attention_while_decoding_many_sessions_of_other_layouts() -> None:
    """Rows that do not begin where much is read at once, values of another width, and views."""
    generator = torch.Generator().manual_seed(0)
    numbers = [torch.randn(*shape, generator=generator) for shape in [(2, 91, 24), (2, 91, 7), (4, 2, 24)]]
    for shift in (0, 1):
        keys, values, queries = (part[..., shift:] for part in numbers)
        requests = [DecodeRequest(queries, keys[:, :count], values[:, :count]) for count in (40, 90)]
        turned = DecodeRequest(queries, keys.transpose(1, 2).contiguous().transpose(1, 2), values)
        with backend.use("triton"):
            found = decode_attention_batch([*requests, turned], scaling=0.3, need_lse=True)
        with backend.use("reference"):
            wanted = decode_attention_batch([*requests, turned], scaling=0.3, need_lse=True)
        torch.testing.assert_close(found, wanted, atol=3e-5, rtol=1e-4)


def test_attention_of_heads_with_other_values() -> None:
    case = make(20, 70)
    values = torch.randn(2, 70, 5, generator=case.generator)
    equal(vertical_slash, case.queries, case.keys, values, *lines(case, 0.2, 0.1), scaling=0.3)
    equal(block_sparse, case.queries, case.keys, values, case.bools(4, 1, 2, share=0.5), scaling=0.3)
    equal(dense_attention, case.queries, case.keys, values, scaling=0.3, need_lse=True)
    equal(decode_attention, case.queries[:, :2], case.keys, values, scaling=0.3, need_lse=True)


def test_attention_reads_transposed_views() -> None:
    case = make(30, 90)
    queries, keys, values = (
        part.transpose(1, 2).contiguous().transpose(1, 2) for part in (case.queries, case.keys, case.values)
    )
    rows = case.queries.transpose(0, 1).contiguous().transpose(0, 1)  # as a model hands them over
    for each in (queries, rows):
        equal(vertical_slash, each, keys, values, *lines(case, 0.2, 0.1), scaling=0.3)
        equal(decode_attention, each[:, :2], keys, values, scaling=0.3, need_lse=True)
        chosen = torch.arange(80).view(40, 2).T  # a view too
        equal(decode_attention, each[:, :2], keys, values, scaling=0.3, columns=chosen, tail=82, need_lse=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16])
def test_triton_is_what_runs(dtype: torch.dtype) -> None:
    with backend.use("triton"):
        served = {name: each.choose("cpu", dtype).name for name, each in backend.operations().items()}
    served.pop("linear")  # a GPU's products are torch's
    assert set(served.values()) == {"triton"}, served


def test_attention_of_rows_that_see_nothing_is_zero() -> None:
    case = make(3, 8)
    none = torch.zeros(4, 8, dtype=torch.bool)
    equal(vertical_slash, case.queries, case.keys, case.values, none, none, scaling=1.0)
    equal(block_sparse, case.queries, case.keys, case.values, none[:, None, :1], scaling=1.0)


def test_what_triton_cannot_serve_goes_to_the_reference() -> None:
    case = make(4, 40, dim=300)
    equal(dense_attention, case.queries, case.keys, case.values, need_lse=True, **case.options)
    equal(block_sparse, case.queries, case.keys, case.values, case.bools(4, 1, 2), tile=24, scaling=0.1)


@given(short(), st.data())
@few
def test_scores_of_lines(case: Case, data: st.DataObject) -> None:
    total = case.keys.shape[1]
    columns = torch.tensor(data.draw(st.lists(st.integers(0, total - 1), min_size=1, max_size=70)))
    queries = torch.randn(case.queries.shape[0], len(columns), case.queries.shape[2], generator=case.generator)
    equal(line_scores, queries.to(case.keys.dtype), case.keys, columns, **case.options)


@given(short(), st.sampled_from(["mean", "sum", "max"]))
@few
def test_scores_of_tokens(case: Case, over_rows: str) -> None:
    rows = min(case.queries.shape[1], 40)
    columns = torch.arange(case.keys.shape[1] - rows, case.keys.shape[1])
    equal(token_scores, case.queries[:, :rows], case.keys, columns, over_rows=over_rows, **case.options)


@given(short(), st.integers(0, 70))
@few
def test_scores_do_not_matter_to_copies(case: Case, count: int) -> None:
    """Gathered pairs are the chosen ones, bit by bit, whatever they hold."""
    indices = torch.randint(0, case.keys.shape[1], (case.keys.shape[0], count), generator=case.generator)
    with backend.use("triton"):
        keys, values = gather_kv(case.keys, case.values, indices)
    for head, row in enumerate(indices):
        torch.testing.assert_close(keys[head], case.keys[head][row], rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(values[head], case.values[head][row], rtol=0, atol=0, equal_nan=True)
