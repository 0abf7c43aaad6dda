"""Decode steps of many sessions in one call: each is what it is alone, and what the reference makes of it in float64."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from loopserve.kernels import backend
from loopserve.kernels.decode_attention import DecodeRequest, decode_attention, decode_attention_batch
from loopserve.kernels.native import library
from tests.kernels.cases import IMPLEMENTATIONS

NAN = float("nan")
LENGTHS = st.one_of(st.sampled_from([1, 4, 255, 256, 257, 700, 1500]), st.integers(4, 900))


def buffer(heads: int, total: int, dim: int, dtype: torch.dtype, strided: bool, source: torch.Generator) -> Tensor:
    """Pairs in a larger buffer that is NaN elsewhere; strided: rows of several heads take turns, as a model lays them out."""
    numbers = torch.randn(heads, total, dim, generator=source, dtype=torch.float32)
    if strided:
        whole = torch.full((total, heads, dim + 16), NAN, dtype=dtype)
        whole.transpose(0, 1)[..., :dim] = numbers
        return whole.transpose(0, 1)[..., :dim]
    whole = torch.full((heads, total + 5, dim), NAN, dtype=dtype)
    whole[:, :total] = numbers
    return whole[:, :total]


def request(
    source: torch.Generator,
    kind: str,
    rows: int,
    total: int,
    *,
    kv_heads: int = 2,
    group: int = 3,
    dim: int = 32,
    dtype: torch.dtype = torch.float32,
    strided: bool = False,
    width: float = 0.3,
) -> DecodeRequest:
    """kind: the whole store, a ragged copy, or in place; width: share of the columns before the tail that is chosen."""
    total = max(total, rows)
    packed = torch.randn(1, kv_heads * group, rows + 2, dim, generator=source, dtype=torch.float32).to(dtype)
    queries = packed[0, :, 1:-1]  # of a packed row
    keys, values = (buffer(kv_heads, total, dim, dtype, strided, source) for _ in range(2))
    if kind == "whole":
        return DecodeRequest(queries, keys, values)
    if kind == "copy":
        first = torch.randint(0, total - rows + 1, (kv_heads,), generator=source)
        for head, start in enumerate(first.tolist()):
            keys[head, :start] = values[head, :start] = NAN
        return DecodeRequest(queries, keys, values, first)
    tail = int(torch.randint(0, total - rows + 1, (), generator=source))
    chosen = int(width * tail)
    columns = torch.full((kv_heads, chosen), -1)
    for head, row in enumerate(columns):
        count = max(chosen - 3 * head, 0)
        row[chosen - count :] = torch.randperm(tail, generator=source)[:count].sort().values
    for head, row in enumerate(columns):
        unused = torch.ones(total, dtype=torch.bool)
        unused[row[row >= 0]] = unused[tail:] = False
        unused[0] = False  # filler may be read there
        keys[head, unused] = values[head, unused] = NAN
    return DecodeRequest(queries, keys, values, None, columns, tail)


@st.composite
def batches(draw: st.DrawFn) -> list[DecodeRequest]:
    source = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    layer = {
        "kv_heads": draw(st.sampled_from([1, 2, 3])),
        "group": draw(st.integers(1, 8)),
        "dim": draw(st.sampled_from([32, 64, 128])),
        "dtype": draw(st.sampled_from([torch.float32, torch.bfloat16])),
    }
    same = draw(st.booleans())
    return [
        request(
            source,
            draw(st.sampled_from(["whole", "copy", "in place"])),
            1 if same else draw(st.integers(1, 4)),
            draw(LENGTHS),
            strided=draw(st.booleans()),
            width=draw(st.sampled_from([0.0, 0.1, 0.9])),
            **layer,
        )
        for _ in range(draw(st.integers(1, 6)))
    ]


def alone(each: DecodeRequest, **options: object) -> tuple[Tensor, Tensor | None]:
    queries, keys, values, first_valid, columns, tail = each
    return decode_attention(
        queries, keys, values, first_valid=first_valid, columns=columns, tail=tail, scaling=0.2, **options
    )


def exact(each: DecodeRequest) -> tuple[Tensor, Tensor | None]:
    """The reference in float64, on pairs without the NaN that nothing may read."""
    wide = [part.double().nan_to_num() for part in each[:3]]
    with backend.use("reference"):
        return alone(DecodeRequest(*wide, *each[3:]), need_lse=True)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@given(requests=batches())
@settings(max_examples=40)
def test_every_session_is_what_it_is_alone(implementation: str, requests: list[DecodeRequest]) -> None:
    if implementation != "cpu":  # these compute on all columns and weigh by 0
        requests = [DecodeRequest(*(part.nan_to_num() for part in each[:3]), *each[3:]) for each in requests]
    with backend.use(implementation):
        found = decode_attention_batch(requests, scaling=0.2, need_lse=True)
        apart = [alone(each, need_lse=True) for each in requests]
    half = requests[0].queries.dtype is torch.bfloat16
    for each, (output, lse), (own, own_lse) in zip(requests, found, apart, strict=True):
        assert torch.equal(output, own) and lse is not None and torch.equal(lse, own_lse)
        wanted, wanted_lse = exact(each)
        tolerance = {"atol": 0.03, "rtol": 0.03} if half else {"atol": 2e-5, "rtol": 1e-4}
        torch.testing.assert_close(output.double(), wanted, **tolerance)
        torch.testing.assert_close(lse, wanted_lse, atol=1e-2 if half else 2e-5, rtol=1e-2 if half else 1e-4)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_a_session_does_not_notice_the_others(threads: int) -> None:
    """Beside one or many others, in any order and of any length, the bits are the same."""
    if library.unavailable() is not None:
        return
    source = torch.Generator().manual_seed(0)
    kinds = [("whole", 5000), ("copy", 1300), ("in place", 9000), ("whole", 1), ("in place", 40), ("whole", 256)]
    requests = [request(source, kind, 1, total) for kind, total in kinds]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with backend.use("cpu"):
            apart = [alone(each)[0] for each in requests]
            for order in (range(6), range(5, -1, -1), (2, 0, 2, 1), (3,)):
                found = decode_attention_batch([requests[index] for index in order], scaling=0.2)
                for index, (output, lse) in zip(order, found, strict=True):
                    assert torch.equal(output, apart[index]) and lse is None
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("options", "dims", "dtype"),
    [
        ({"softcap": 5.0}, (32, 32), torch.float32),
        ({}, (24, 24), torch.float32),
        ({}, (32, 16), torch.float32),
        ({}, (32, 32), torch.float64),
        ({}, (32, 32), torch.float16),
    ],
)
def test_what_the_compiled_kernel_cannot_serve_goes_the_slower_way(
    implementation: str, options: dict[str, float], dims: tuple[int, int], dtype: torch.dtype
) -> None:
    source = torch.Generator().manual_seed(1)
    requests = [request(source, kind, 1, 70, dim=dims[0], dtype=dtype) for kind in ("whole", "whole", "copy")]
    requests = [each._replace(values=each.values[..., : dims[1]]) for each in requests]
    with backend.use(implementation):
        found = decode_attention_batch(requests, scaling=0.2, **options)
    for each, (output, _) in zip(requests, found, strict=True):
        with backend.use("reference"):
            wanted, _ = alone(DecodeRequest(*(part.double() for part in each[:3]), *each[3:]), **options)
        assert output.dtype is dtype
        tolerance = 5e-3 if dtype is torch.float16 else 2e-5
        torch.testing.assert_close(output.double(), wanted, atol=tolerance, rtol=tolerance)


def test_many_rows_of_a_group_take_the_tiles() -> None:
    """Where a KV head has more than 16 rows, its session is computed as ``decode_attention`` computes it: by tiles."""
    source = torch.Generator().manual_seed(2)
    requests = [request(source, "whole", rows, 300, group=8) for rows in (1, 4, 2, 3)]
    found = decode_attention_batch(requests, scaling=0.2)
    assert all(torch.equal(output, alone(each)[0]) for each, (output, _) in zip(requests, found, strict=True))
    wide = [request(source, "whole", 1, 300, kv_heads=1, group=20) for _ in range(2)]
    found = decode_attention_batch(wide, scaling=0.2)
    assert all(torch.equal(output, alone(each)[0]) for each, (output, _) in zip(wide, found, strict=True))


def test_outputs_of_one_step_each_are_one_tensor() -> None:
    """Whoever joins them needs no copy."""
    source = torch.Generator().manual_seed(3)
    found = decode_attention_batch([request(source, "whole", 1, 40 + 9 * i) for i in range(4)], scaling=0.2)
    if library.unavailable() is None:
        assert len({output.untyped_storage().data_ptr() for output, _ in found}) == 1
    assert [output.shape for output, _ in found] == [(6, 1, 32)] * 4
    assert decode_attention_batch([], scaling=0.2) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"queries": torch.zeros(6, 41, 32)}, "request 1: 41 queries cannot be the last of 40 keys"),
        ({"queries": torch.zeros(6, 0, 32)}, "request 1: .* must be non-empty"),
        ({"values": torch.zeros(2, 39, 32)}, "request 1: values .* do not fit keys"),
        ({"keys": torch.zeros(2, 40, 32, dtype=torch.float64)}, "request 1: queries are torch.float32"),
        ({"first_valid": torch.tensor([0])}, "request 1: first_valid"),
        ({"first_valid": torch.tensor([0, 99])}, r"request 1: first_valid must lie in \[0, 41\)"),
        ({"columns": torch.tensor([[0], [9]]), "tail": 9}, r"request 1: columns must lie in \[-1, 9\), got 0 to 9"),
        ({"columns": torch.tensor([[0], [-2]]), "tail": 9}, r"request 1: columns must lie in \[-1, 9\), got -2 to 0"),
        ({"columns": torch.zeros(2, 1), "tail": 9}, "request 1: columns torch.float32"),
        ({"columns": torch.zeros(2, 1, dtype=torch.long), "tail": 40}, "request 1: tail=40"),
        ({"queries": torch.zeros(4, 1, 32)}, r"request 1 has queries \[4, 1, 32\].*request 0.*\[6, 1, 32\]"),
        ({"values": torch.zeros(2, 40, 16)}, "request 1 has .* values .2, 40, 16"),
        (
            {name: torch.zeros(2, 40, 32).bfloat16() for name in ("queries", "keys", "values")},
            "request 1 has .*bfloat16",
        ),
        ({"queries": torch.zeros(6, 1, 32, device="meta")}, "request 1: queries are .* on meta"),
    ],
)
def test_a_request_that_does_not_fit_is_named(change: dict[str, object], message: str) -> None:
    source = torch.Generator().manual_seed(4)
    good, bad = (request(source, "whole", 1, 40) for _ in range(2))
    with pytest.raises(ValueError, match=f"decode_attention_batch: {message}"):
        decode_attention_batch([good, bad._replace(**change), good], scaling=0.2)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("form", ["strided", "transposed", "inference", "negative"])
def test_any_layout_gives_the_same(implementation: str, form: str) -> None:
    source = torch.Generator().manual_seed(5)
    plain = [request(source, kind, 1, 90, width=0.4) for kind in ("copy", "in place", "whole")]
    plain = [DecodeRequest(*(part.nan_to_num().contiguous() for part in each[:3]), *each[3:]) for each in plain]

    def laid_out(tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        if form == "strided":
            apart = tensor.new_full((*tensor.shape[:-1], 2 * tensor.shape[-1]), 7)
            apart[..., ::2] = tensor
            return apart[..., ::2]
        if form == "transposed" and tensor.dim() > 1:
            return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)
        if form == "negative" and tensor.is_floating_point():
            return torch._neg_view(-tensor)
        with torch.inference_mode():
            return tensor.clone()

    other = [DecodeRequest(*(laid_out(part) for part in each[:5]), each.tail) for each in plain]
    with backend.use("reference"):
        wanted = decode_attention_batch(plain, scaling=0.2, need_lse=True)
    if form == "negative" and implementation == "cpu":
        with backend.use("cpu"), pytest.raises(ValueError, match="queries must be"):
            decode_attention_batch(other, scaling=0.2)
        return
    with backend.use(implementation):
        found = decode_attention_batch(other, scaling=0.2, need_lse=True)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


def test_lower_instruction_sets_give_the_same() -> None:
    """A processor without the best instructions compiles other code: the same tests, in a process of its own."""
    if library.unavailable() is not None or library.level() not in ("avx512bf16", "avx512"):
        return
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", __file__]
    done = subprocess.run(
        [*command, "-k", "alone or notice"],
        env=os.environ | {"LOOPSERVE_CPU_LEVEL": "avx2"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
