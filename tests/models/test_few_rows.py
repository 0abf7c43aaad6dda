"""A bfloat16 model multiplies the rows of decode steps by loopserve's kernel; it stays the model that it is."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional
from transformers import PreTrainedModel

from loopserve import Engine
from loopserve.kernels.linear import linear
from loopserve.models import few_rows
from loopserve.models.few_rows import FewRowsLinear, serve_few_rows
from loopserve.models.loading import load


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return load("demo", dtype="bfloat16", device="cpu")[0]


def test_a_bfloat16_model_is_served_by_it_and_no_other() -> None:
    for dtype, kind in (("bfloat16", FewRowsLinear), ("float32", torch.nn.Linear)):
        loaded, _ = load("demo", dtype=dtype, device="cpu")
        kinds = {type(each) for each in loaded.modules() if isinstance(each, torch.nn.Linear)}
        assert kinds == {kind}


def test_weights_and_names_stay(model: PreTrainedModel) -> None:
    plain = copy.deepcopy(model)
    for each in plain.modules():
        if isinstance(each, FewRowsLinear):
            each.__class__ = torch.nn.Linear
    before = {name: each.data_ptr() for name, each in plain.named_parameters()}
    serve_few_rows(plain)
    assert {name: each.data_ptr() for name, each in plain.named_parameters()} == before
    ids = torch.arange(4, 12)[None]
    with torch.no_grad():
        assert torch.equal(plain(ids).logits, model(ids).logits)


@pytest.mark.parametrize(("rows", "served"), [(1, 1), (8, 1), (9, 0)])
def test_few_rows_are_multiplied_by_the_kernel(rows: int, served: int, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, calls = torch.nn.Linear(32, 48, dtype=torch.bfloat16), list[torch.Tensor]()
    layer.__class__ = FewRowsLinear

    def counting(*arguments: torch.Tensor) -> torch.Tensor:
        calls.append(arguments[0])
        return linear(*arguments)

    monkeypatch.setattr(few_rows, "linear", counting)
    with torch.no_grad():
        layer(torch.zeros(rows, 32, dtype=torch.bfloat16))
    assert len(calls) == served


def test_weights_of_another_kind_of_tensor_stay_torchs() -> None:
    """Quantised weights say that they are bfloat16, and have no numbers of that kind."""

    class Quantised(torch.Tensor):
        pass

    layer = torch.nn.Linear(32, 48, dtype=torch.bfloat16, bias=False)
    holder = torch.nn.Sequential(layer)
    layer.weight = torch.nn.Parameter(layer.weight.detach().as_subclass(Quantised), requires_grad=False)  # type: ignore[arg-type]
    serve_few_rows(holder)  # type: ignore[arg-type]
    assert type(layer) is torch.nn.Linear


def test_many_rows_gradients_autocast_and_other_dtypes_are_torchs() -> None:
    layer = torch.nn.Linear(32, 48, dtype=torch.bfloat16)
    layer.__class__ = FewRowsLinear
    rows = torch.linspace(-1, 1, 64, dtype=torch.float32).view(2, 32)
    with torch.no_grad():
        many = rows.to(torch.bfloat16).repeat(20, 1)
        assert torch.equal(layer(many), functional.linear(many, layer.weight, layer.bias))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert layer(rows).dtype is torch.bfloat16
        with pytest.raises(RuntimeError, match="dtype"):
            layer(rows)
    layer(rows.to(torch.bfloat16)).float().sum().backward()  # type: ignore[no-untyped-call]  # of torch
    assert layer.weight.grad is not None
    with torch.no_grad():
        assert layer.float()(rows).dtype is torch.float32


def test_sessions_of_a_pass_answer_as_alone() -> None:
    """Bit by bit: up to eight rows are multiplied as one is."""
    engine = Engine(*load("demo", dtype="bfloat16", device="cpu"), "dense")
    words = ("lisbon", "madrid", "rome", "paris", "oslo")
    messages = [f"the code of {word} is amber falcon river . what is the code of {word} ?" for word in words]
    alone = [engine.session().send(each, max_new_tokens=12, logprobs=True) for each in messages]
    together = engine.batch([(engine.session(), each) for each in messages], max_new_tokens=12, logprobs=True)
    assert [each.token_ids for each in together] == [each.token_ids for each in alone]
    assert [each.logprobs for each in together] == [each.logprobs for each in alone]
