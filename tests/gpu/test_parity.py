"""The kernels that a GPU runs equal their references, in every dtype and head size they claim to serve."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from loopserve.core.kv.key_summaries import KeySummaries
from loopserve.kernels import backend
from loopserve.kernels.block_sparse import block_sparse
from loopserve.kernels.decode_attention import decode_attention
from loopserve.kernels.dense_attention import dense_attention
from loopserve.kernels.gather_kv import gather_kv
from loopserve.kernels.key_codes import unpack
from loopserve.kernels.line_scores import line_scores
from loopserve.kernels.select_lines import select_lines
from loopserve.kernels.token_scores import token_scores
from loopserve.kernels.top_columns import top_columns
from loopserve.kernels.vertical_slash import vertical_slash
from tests.gpu.cases import turn

TOLERANCE = {torch.float32: 2e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}
SHAPES = [(1, 1), (1, 2000), (63, 63), (111, 1000), (512, 4096), (1000, 1000)]


def equal(function: Callable[..., Any], *args: Any, **options: Any) -> None:
    with backend.use("reference"):
        wanted = function(*args, **options)
    found = function(*args, **options)
    if isinstance(wanted, Tensor):
        wanted, found = (wanted,), (found,)
    bound = TOLERANCE[args[0].dtype]
    for each, right in zip(found, wanted, strict=True):
        if right is not None:
            assert each.dtype == right.dtype and not each.isnan().any()
            torch.testing.assert_close(each.float(), right.float(), atol=bound, rtol=bound)


def test_triton_is_what_runs() -> None:
    for name, each in backend.operations().items():
        own = "reference" if name == "linear" else "triton"  # a GPU's products are torch's
        assert each.choose("cuda", torch.bfloat16).name == own, name


@pytest.mark.parametrize(("rows", "total"), SHAPES)
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("channels", [64, 128])
def test_every_operation(rows: int, total: int, dtype: torch.dtype, channels: int) -> None:
    made = turn(rows, total, dtype=dtype, channels=channels)
    part, options = (made.queries, made.keys, made.values), {"scaling": made.scaling}
    equal(vertical_slash, *part, made.verticals, made.slashes, **options)
    blocks = torch.rand(8, -(-rows // 64), -(-total // 64), device="cuda") < 0.3
    equal(block_sparse, *part, blocks, **options)
    equal(dense_attention, *part, need_lse=True, **options)
    equal(dense_attention, *part, **options)
    equal(dense_attention, *part, window=100, need_lse=True, **options)
    few = made.queries[:, -min(rows, 8) :]
    equal(decode_attention, few, made.keys, made.values, need_lse=True, **options)
    columns = torch.arange(total - few.shape[1], total, device="cuda")
    equal(line_scores, few, made.keys, columns, **options)
    for over_rows in ("mean", "sum", "max"):
        equal(token_scores, few, made.keys, columns, over_rows=over_rows, **options)
    equal(gather_kv, made.keys, made.values, torch.randint(0, total, (2, 77), device="cuda"))


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("rows", [1, 7, 40])
def test_decoding_over_chosen_columns_in_place(rows: int, dtype: torch.dtype) -> None:
    made = turn(rows, 5000, dtype=dtype)
    columns = torch.full((2, 1500), -1, device="cuda")
    for head, count in enumerate((1500, 70)):
        columns[head, 1500 - count :] = torch.randperm(4900, device="cuda")[:count].sort().values
    options: dict[str, Any] = {"scaling": made.scaling, "columns": columns, "tail": 4900, "need_lse": True}
    equal(decode_attention, made.queries, made.keys, made.values, **options)
    equal(decode_attention, made.queries, made.keys, made.values, **options | {"columns": columns[:, :0]})


@pytest.mark.parametrize("odd", [None, float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("total", [1, 300, 40000])
def test_the_best_columns_are_the_same(total: int, odd: float | None) -> None:
    scores = (torch.randn(8, total, device="cuda") * 2).round()  # many equals
    if odd is not None:
        scores[torch.rand(8, total, device="cuda") < 0.2] = odd
    for budget in {0, 1, min(50, total), total // 2, total}:
        for first_valid in (None, torch.randint(0, total - budget + 1, (8,), device="cuda")):
            options: dict[str, Any] = {"sink_tokens": 4, "recent_window": 64, "first_valid": first_valid}
            found = top_columns(scores, budget, **options)
            with backend.use("reference"):
                assert torch.equal(found, top_columns(scores, budget, **options))


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(("channels", "page"), [(64, 16), (128, 32), (80, 7), (256, 100)])
def test_codes_and_what_they_say(channels: int, page: int, bits: int, dtype: torch.dtype) -> None:
    made = turn(1, 3333, dtype=dtype, channels=channels)
    made_by = {name: KeySummaries(page, bits) for name in ("reference", "triton")}
    for name, pages in made_by.items():
        with backend.use(name):
            for end in (1000, 1001, 3333):
                pages.update(made.keys[:, :end])
    wanted, right = made_by["reference"], made_by["triton"]
    assert torch.equal(wanted.low, right.low) and torch.equal(wanted.high, right.high)
    # PyTorch multiplies by the reciprocal here instead of dividing, so a few keys halfway fall to the other side.
    codes, others = (unpack(each.codes.flatten(1, 2)[:, :3333], bits).int() for each in (wanted, right))
    assert (codes - others).abs().max() <= 1 and (codes != others).float().mean() < 1e-3

    base = torch.arange(0, 3000, 5, device="cuda").repeat(2, 1)
    found = {}
    for name in made_by:
        with backend.use(name):
            observed = torch.zeros(2, 3200, device="cuda")
            jumps = wanted.jumps(made.queries, base, 3200, 100, made.scaling, observed)
            found[name] = wanted.logits(made.queries, made.scaling), observed, jumps
    for each, other in zip(found["triton"][:2], found["reference"][:2], strict=True):
        torch.testing.assert_close(each, other, atol=1e-3, rtol=1e-3)
    jumps, best = found["triton"][2], found["reference"][0].amax(1)
    assert (jumps.diff(dim=1) > 0).all()
    # Logits that differ by rounding may change places.
    worth, most = (best.gather(1, each).sort(dim=1).values for each in (jumps, found["reference"][2]))
    torch.testing.assert_close(worth, most, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(("channels", "group"), [(256, 1), (80, 7), (128, 1)])
def test_odd_heads_with_filler_and_softcap(channels: int, group: int) -> None:
    made = turn(300, 2500, channels=channels, group=group)
    options: dict[str, Any] = {"scaling": made.scaling, "softcap": 20.0}
    first_valid = torch.tensor([0, 900], device="cuda")
    made.keys[1, :900] = made.values[1, :900] = float("nan")
    options["first_valid"] = first_valid
    equal(vertical_slash, made.queries, made.keys, made.values, made.verticals, made.slashes, **options)
    equal(dense_attention, made.queries, made.keys, made.values, need_lse=True, **options)
    equal(decode_attention, made.queries[:, :3], made.keys, made.values, need_lse=True, **options)


def test_long_rows_are_split_and_dense_heads_are_served() -> None:
    made = turn(130, 60000)
    made.verticals[0], made.slashes[1] = True, True
    equal(vertical_slash, made.queries, made.keys, made.values, made.verticals, made.slashes, scaling=made.scaling)


@pytest.mark.parametrize("cost", ["length", "tile"])
def test_selection_reaches_its_target_as_cheaply(cost: str) -> None:
    made = turn(1500, 6000, dtype=torch.float32)
    columns = torch.arange(4500, 6000, 24, device="cuda")
    rows = line_scores(made.queries[:, columns - 4500] * 2, made.keys, columns, scaling=made.scaling).probabilities
    found = select_lines(rows, columns, 1500, alpha=0.9, cost=cost)  # type: ignore[arg-type]
    with backend.use("torch"):
        wanted = select_lines(rows, columns, 1500, alpha=0.9, cost=cost)  # type: ignore[arg-type]
    assert (found.coverage >= 0.9 - 1e-4).all()
    assert found.cost.sum() <= 1.02 * wanted.cost.sum()
    offsets = columns[:, None] - torch.arange(6000, device="cuda")
    mask = (found.verticals[:, None] | found.slashes[:, offsets.clamp(min=0)]) & (offsets >= 0)
    torch.testing.assert_close(found.row_coverage, (rows * mask).sum(-1), atol=1e-4, rtol=1e-4)
