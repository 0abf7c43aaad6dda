"""Where a compiled kernel is handed an address, what lies there is what C expects, whatever the tensor looks like."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import loopserve.kernels
from loopserve.kernels import backend
from loopserve.kernels.block_sparse import block_sparse
from loopserve.kernels.decode_attention import decode_attention
from loopserve.kernels.dense_attention import dense_attention
from loopserve.kernels.gather_kv import gather_kv
from loopserve.kernels.key_codes import KeyCodes, code_jumps, code_logits, summarise_pages
from loopserve.kernels.line_scores import line_scores
from loopserve.kernels.native.library import address
from loopserve.kernels.token_scores import token_scores
from loopserve.kernels.top_columns import top_columns
from loopserve.kernels.vertical_slash import vertical_slash
from tests.kernels.cases import IMPLEMENTATIONS

TOTAL, DIM = 100, 32
HUGE = 2**64 + 1  # wraps round to 1 in an int64


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def freed() -> Tensor:
    held = torch.zeros(4, 8)
    held.untyped_storage().resize_(0)
    return held


@pytest.mark.parametrize(
    ("tensor", "strided", "written"),
    [
        (torch.zeros(4, 8, dtype=torch.float64), 0, False),
        (torch.zeros(4, 8, dtype=torch.bfloat16), 0, False),
        (torch.zeros(4, 8, dtype=torch.int32), 0, False),
        (torch.zeros(4, 7), 0, False),
        (torch.zeros(3, 8), 0, False),
        (torch.zeros(32), 0, False),
        (torch.zeros(8, 4).t(), 0, False),
        (torch.zeros(8, 4).t(), 1, False),
        (torch.zeros(4, 16)[:, ::2], 1, False),
        (torch.zeros(4, 1).expand(4, 8), 1, False),
        (torch.zeros(1, 8).expand(4, 8), 0, False),
        (torch.zeros(1, 8).expand(4, 8), 1, True),
        (torch.zeros(4, 8, device="meta"), 0, False),
        (torch._neg_view(torch.zeros(4, 8)), 0, False),
        (freed(), 0, False),
    ],
)
def test_an_address_is_given_only_of_what_c_expects(tensor: Tensor, strided: int, written: bool) -> None:
    with pytest.raises(ValueError, match=r"^numbers must be torch\.float32|^numbers .* has no memory"):
        address("numbers", tensor, torch.float32, (4, 8), strided=strided, written=written)


@pytest.mark.parametrize(
    ("tensor", "strided", "written"),
    [
        (torch.zeros(4, 8), 0, True),
        (torch.zeros(4, 16)[:, :8], 1, True),
        (torch.zeros(1, 8).expand(4, 8), 1, False),
    ],
)
def test_what_c_expects_has_an_address(tensor: Tensor, strided: int, written: bool) -> None:
    place = address("numbers", tensor, torch.float32, (4, 8), strided=strided, written=written)
    assert place == tensor.data_ptr()


def test_addresses_are_taken_in_one_place_for_each_kind_of_kernel() -> None:
    package = Path(loopserve.kernels.__file__).parent
    taken = {
        str(path.relative_to(package))
        for path in package.rglob("*.py")
        if ".data_ptr()" in path.read_text().replace(".untyped_storage().data_ptr()", "")
    }
    assert taken == {"native/library.py", "gpu/decode_batch.py"}


def forms(tensor: Tensor) -> dict[str, Tensor]:
    """The same numbers in other layouts, the last dimension strided among them."""
    apart = tensor.new_full((*tensor.shape[:-1], 2 * tensor.shape[-1]), 7)
    apart[..., ::2] = tensor
    with torch.inference_mode():
        inference = tensor.clone()
    return {
        "strided": apart[..., ::2],
        "transposed": tensor.transpose(-1, -2).contiguous().transpose(-1, -2) if tensor.dim() > 1 else tensor,
        "inference": inference,
    }


def results() -> dict[str, Any]:
    """Every operation that takes queries, keys and values, and what else it takes, by name."""
    queries, keys, values = normal(4, 6, DIM), normal(2, TOTAL, DIM, seed=1), normal(2, TOTAL, DIM, seed=2)
    lines = [normal(4, TOTAL, seed=seed) > 0.5 for seed in (3, 4)]
    blocks = normal(4, 1, 2, seed=5) > 0
    columns, few = torch.arange(TOTAL - 6, TOTAL), torch.tensor([[1, 5, 9], [0, 2, 70]])
    first = torch.tensor([3, 0])
    return {
        "vertical_slash": (vertical_slash, [queries, keys, values, *lines], {"first_valid": first}),
        "block_sparse": (block_sparse, [queries, keys, values, blocks], {"first_valid": first}),
        "dense_attention": (dense_attention, [queries, keys, values], {"need_lse": True}),
        "decode_attention": (decode_attention, [queries, keys, values], {"columns": few, "tail": 80, "need_lse": True}),
        "line_scores": (line_scores, [queries, keys, columns], {"first_valid": first}),
        "token_scores": (token_scores, [queries, keys, columns], {}),
        "gather_kv": (gather_kv, [keys, values, few], {}),
    }


@pytest.mark.parametrize("name", results())
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("form", ["strided", "transposed", "inference", "expanded"])
def test_any_layout_gives_the_same(name: str, implementation: str, form: str) -> None:
    call, tensors, options = results()[name]
    scaling = {} if name == "gather_kv" else {"scaling": 0.2}
    if form == "expanded":  # one KV head for both, at a stride of 0
        tensors = [each[:1].expand(2, -1, -1) if each.shape[0] == 2 and each.dim() == 3 else each for each in tensors]
        other = [each.contiguous() for each in tensors]
    else:
        other, tensors = tensors, [forms(each)[form] for each in tensors]
        options = {key: forms(each)[form] if isinstance(each, Tensor) else each for key, each in options.items()}
    with backend.use("reference"):
        wanted = call(*other, **results()[name][2], **scaling)
    with backend.use(implementation):
        found = call(*tensors, **options, **scaling)
    torch.testing.assert_close(tuple(found), tuple(wanted), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_numbers_without_room_in_an_int64_do_not_wrap_round(implementation: str) -> None:
    queries, keys = normal(4, 70, DIM), normal(2, TOTAL, DIM, seed=1)
    with backend.use(implementation):
        whole = dense_attention(queries, keys, keys, scaling=0.2)[0]
        assert torch.equal(dense_attention(queries, keys, keys, scaling=0.2, window=HUGE)[0], whole)
        blocks = torch.ones(4, 1, 1, dtype=torch.bool)
        torch.testing.assert_close(block_sparse(queries, keys, keys, blocks, tile=HUGE, scaling=0.2)[0], whole)
        scores = normal(2, TOTAL)
        low, high = (torch.zeros(2, 1, DIM) for _ in range(2))
        summarise_pages(keys, HUGE, 0, low, high)
        assert torch.equal(low[:, 0], keys.amin(1)) and torch.equal(high[:, 0], keys.amax(1))
        forced = top_columns(scores, 7, sink_tokens=HUGE, recent_window=0)
        assert torch.equal(forced, top_columns(scores, 7, sink_tokens=TOTAL, recent_window=0))
        forced = top_columns(scores, 7, sink_tokens=0, recent_window=HUGE)
        assert torch.equal(forced, top_columns(scores, 7, sink_tokens=0, recent_window=TOTAL))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_nothing_chosen_is_no_address_to_read(implementation: str) -> None:
    queries, keys = normal(4, 2, DIM), normal(2, TOTAL, DIM, seed=1)
    none = torch.empty(2, 0, dtype=torch.long)
    with backend.use(implementation):
        assert gather_kv(keys, keys, none)[0].shape == (2, 0, DIM)
        assert top_columns(normal(2, TOTAL), 0).shape == (2, 0)
        assert top_columns(normal(2, 0), 4).shape == (2, 0)
        found = decode_attention(queries, keys, keys, scaling=0.2, columns=none, tail=40)[0]
    wanted = dense_attention(queries, keys[:, 40:], keys[:, 40:], scaling=0.2)[0]
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


def test_pairs_of_two_dtypes_are_refused() -> None:
    """They are copied by the size of a key's numbers, which would write past these values."""
    with pytest.raises(ValueError, match="values in torch"):
        gather_kv(normal(2, 9, 16), normal(2, 9, 16).bfloat16(), torch.zeros(2, 4, dtype=torch.long))


def coded(layout: str, implementation: str) -> KeyCodes:
    """Codes of some keys, in buffers of a layout."""
    pages, page, width = 13, 8, DIM // 4
    if layout == "transposed":
        low, high = (torch.zeros(2, DIM, pages).transpose(1, 2) for _ in range(2))
    else:
        low, high = torch.zeros(2, pages, DIM), torch.zeros(2, pages, DIM)
    if layout == "two strides":
        high = torch.zeros(2, pages + 9, DIM)[:, :pages]
    codes = torch.zeros(2, pages, page, width, dtype=torch.uint8)
    if layout == "strided codes":
        codes = torch.zeros(2, pages, page, 2 * width, dtype=torch.uint8)[..., ::2]
    with backend.use(implementation):
        summarise_pages(normal(2, TOTAL, DIM), page, 0, low, high, codes, 2)
    return KeyCodes(low, high, codes, 2, TOTAL)


@pytest.mark.parametrize("layout", ["transposed", "two strides", "strided codes"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_codes_of_any_layout_give_the_same(layout: str, implementation: str) -> None:
    wanted, found = coded("dense", "reference"), coded(layout, implementation)
    assert torch.equal(found.low, wanted.low) and torch.equal(found.high, wanted.high)
    queries, base = normal(4, 1, DIM, seed=1), torch.zeros(2, 1, dtype=torch.long)
    with backend.use(implementation):
        logits = code_logits(queries, found, scaling=0.2)
        jumps = code_jumps(queries, found, base, 90, 9, scaling=0.2)
    torch.testing.assert_close(logits, code_logits(queries, wanted, scaling=0.2), atol=0.05, rtol=0.05)
    assert jumps.shape == (2, 10) and (jumps.diff() > 0).all()


def test_codes_of_another_width_are_refused() -> None:
    with pytest.raises(ValueError, match="do not hold 8 bits"):
        code_logits(normal(4, 1, DIM), replace(coded("dense", "reference"), bits=8), scaling=0.2)
    with pytest.raises(ValueError, match="page=0"):
        summarise_pages(normal(2, TOTAL, DIM), 0, 0, torch.zeros(2, 1, DIM), torch.zeros(2, 1, DIM))
