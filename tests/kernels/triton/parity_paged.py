"""Kernels over pairs in the blocks of a paged cache give what they give over one tensor, bit by bit, and what the
reference gives, interpreted. Started by ``test_interpreted``.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from loopserve.kernels import backend
from loopserve.kernels.decode_attention import DecodeRequest, decode_attention, decode_attention_batch
from loopserve.kernels.paged import Paged
from loopserve.kernels.vertical_slash import vertical_slash
from tests.kernels.blocks import LAYOUTS, in_blocks
from tests.kernels.cases import Case, make
from tests.kernels.triton.parity import (
    chosen_columns,
    equal,
    in_half,
    lines,
    shares,
    short,
    short_inputs_take_every_path,
    steps,
)

assert os.environ.get("TRITON_INTERPRET") == "1"
__all__ = ["short_inputs_take_every_path"]  # a fixture for this module too
sizes = st.sampled_from([1, 2, 16, 32, 128])
layouts = st.sampled_from(LAYOUTS)


def same_in_blocks(
    function: Callable[..., Any],
    case: Case,
    size: int,
    layout: str,
    *args: Any,
    rows: int | None = None,
    **options: Any,
) -> None:
    """A kernel gives the same over blocks and over one tensor, and what the reference gives."""
    queries = case.queries[:, :rows]
    paged = in_blocks(case.keys, case.values, size, layout, case.generator)
    equal(function, queries, *paged, *args, **options)
    with backend.use("triton"):
        found = function(queries, *paged, *args, **options)
        whole = function(queries, case.keys, case.values, *args, **options)
    for each, right in zip(found, whole, strict=True):
        assert torch.equal(each, right)


@given(short(), sizes, layouts, shares, shares)
@settings(max_examples=12)
def test_lines(case: Case, size: int, layout: str, vertical: float, slash: float) -> None:
    same_in_blocks(vertical_slash, case, size, layout, *lines(case, vertical, slash), **case.options)


def test_lines_of_a_late_turn() -> None:
    case = in_half(make(20, 700, group=2, kv_heads=1, dim=16, seed=3))
    same_in_blocks(vertical_slash, case, 16, "packed", *lines(case, 0.1, 0.02), **case.options)


@given(short(), sizes, layouts, st.integers(1, 5))
@settings(max_examples=8)
def test_decoding(case: Case, size: int, layout: str, rows: int) -> None:
    same_in_blocks(decode_attention, case, size, layout, rows=rows, need_lse=True, **case.options)


@given(short(), sizes, layouts, st.integers(1, 24), st.data())
@settings(max_examples=12)
def test_decoding_with_chosen_columns(case: Case, size: int, layout: str, rows: int, data: st.DataObject) -> None:
    queries, (heads, total) = case.queries[:, :rows], case.keys.shape[:2]
    if case.first_valid is not None:
        case.keys.nan_to_num_(0.0), case.values.nan_to_num_(0.0)
    tail = data.draw(st.integers(0, total - queries.shape[1]))
    columns = chosen_columns(case, tail, [data.draw(st.integers(0, tail)) for _ in range(heads)])
    options = {"scaling": case.scaling, "softcap": case.softcap, "need_lse": True, "columns": columns, "tail": tail}
    same_in_blocks(decode_attention, case, size, layout, rows=rows, **options)


def test_decoding_reads_chosen_columns_alone() -> None:
    """What is neither chosen nor in the tail may be anything, in blocks of the table as well."""
    case = in_half(make(1, 1000, group=7, dim=16))
    columns = chosen_columns(case, 900, [300, 20])
    options = {"scaling": 0.3, "columns": columns, "tail": 900, "need_lse": True}
    with backend.use("reference"):
        wanted = decode_attention(case.queries, case.keys, case.values, **options)
    for head, row in enumerate(columns):
        unused = torch.ones(1000, dtype=torch.bool)
        unused[row[row >= 0]] = unused[900:] = False
        case.keys[head, unused] = case.values[head, unused] = float("nan")
    paged = in_blocks(case.keys, case.values, 16, "NHD", case.generator)
    with backend.use("triton"):
        found = decode_attention(case.queries, *paged, **options)
    torch.testing.assert_close(found, wanted, atol=1e-2, rtol=1e-2)


def moved(request: DecodeRequest, size: int, layout: str) -> DecodeRequest:
    """The request over blocks."""
    assert isinstance(request.keys, Tensor) and isinstance(request.values, Tensor)
    keys, values = in_blocks(request.keys, request.values, size, layout, torch.Generator().manual_seed(size))
    return request._replace(keys=keys, values=values)


@given(steps(), st.lists(st.sampled_from([0, 0, 1, 16, 64]), min_size=4, max_size=4), layouts)
@settings(max_examples=12)
def test_decoding_many_sessions(requests: list[DecodeRequest], where: list[int], layout: str) -> None:
    """Some over blocks, of sizes that may differ, and some over one tensor."""
    options = {"scaling": 0.3, "softcap": None, "need_lse": True}
    mixed = [moved(each, size, layout) if size else each for each, size in zip(requests, where, strict=False)]
    with backend.use("triton"):
        found = decode_attention_batch(mixed, **options)
    with backend.use("reference"):
        wanted = decode_attention_batch(requests, **options)
    half = requests[0].queries.dtype == torch.float16
    within = {"atol": 1e-2, "rtol": 1e-2} if half else {"atol": 3e-5, "rtol": 1e-4}
    for each, right, request in zip(found, wanted, requests, strict=True):
        torch.testing.assert_close(each, right, **within)
        assert each[0].shape == request.queries.shape


def test_channels_that_do_not_lie_side_by_side_go_to_the_reference() -> None:
    case = make(3, 40)
    keys, values = in_blocks(case.keys, case.values, 16, "NHD", case.generator)
    turned = Paged(keys.blocks.transpose(2, 3).contiguous().transpose(2, 3), keys.table, 40)
    equal(decode_attention, case.queries, turned, values, scaling=0.3, need_lse=True)
