"""One place decides which implementation runs, and says why."""

from __future__ import annotations

import pytest
import torch

from loopserve.kernels import backend
from loopserve.kernels.backend import FASTEST_FIRST, Operation


def test_an_unknown_backend_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOOPSERVE_KERNELS", "cuda13")
    with pytest.raises(ValueError, match=r"'cuda13' is unknown \(known: auto, reference, torch, cpu, triton\)"):
        backend.chosen()
    with pytest.raises(ValueError, match="'fast' is unknown"), backend.use("fast"):
        pass


@pytest.fixture
def dense() -> Operation:
    return backend.operations()["dense_attention"]


def test_the_variable_and_the_override_decide(dense: Operation, monkeypatch: pytest.MonkeyPatch) -> None:
    def choice(device: str = "cpu", dtype: torch.dtype = torch.float32) -> str:
        return dense.choose(device, dtype).name

    assert choice() != "reference"
    monkeypatch.setenv("LOOPSERVE_KERNELS", "reference")
    assert choice() == "reference"
    with backend.use("torch"):
        assert choice() == "torch"
        assert choice(dtype=torch.float64) == "reference"
        assert choice("cuda") == "reference"
    assert choice() == "reference"


def test_a_choice_that_cannot_run_is_an_error_not_another_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    operation = Operation("fast", {"reference": "nowhere", "triton": "nowhere"})
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    backend.unavailable.cache_clear()
    with backend.use("triton"), pytest.raises(RuntimeError, match=r"triton, but fast cannot run that way: .*INTERPRET"):
        operation(torch.zeros(1))


def test_what_a_faster_one_cannot_serve_goes_to_the_next() -> None:
    def odd(number: torch.Tensor) -> str | None:
        return None if number.item() % 2 else "even"

    operation = Operation(
        "describe_kernel",
        {"reference": "tests.kernels.test_backend", "torch": "nowhere"},
        limits={"torch": odd},
    )
    assert operation(torch.tensor(2.0)) == "reference"
    with pytest.raises(ModuleNotFoundError, match="nowhere"):
        operation(torch.tensor(1.0))


def describe_kernel(number: torch.Tensor) -> str:
    """Stands in for a reference implementation."""
    return "reference"


def test_every_operation_says_what_serves_it_and_why() -> None:
    rows = {row["operation"]: row for row in backend.describe()}
    assert {
        "block_sparse",
        "decode_attention",
        "decode_attention_batch",
        "dense_attention",
        "gather_kv",
        "line_scores",
        "select_lines",
        "token_scores",
        "vertical_slash",
    } <= set(rows)
    assert {row["implementation"] for row in rows.values()} <= set(FASTEST_FIRST) - {"triton"}
    assert all(row["why"] for row in rows.values())
    with backend.use("reference"):
        assert {row["why"] for row in backend.describe()} == {"LOOPSERVE_KERNELS=reference"}
    in_double = {row["operation"]: row["why"] for row in backend.describe("cpu", torch.float64)}
    assert "float64 is served by the reference only" in in_double["vertical_slash"]


def test_no_module_of_an_operation_is_called_like_a_library() -> None:
    """Importing ``package.torch`` would bind ``torch`` in the package to that module."""
    paths = {path.partition(":")[0] for each in backend.operations().values() for path in each.modules.values()}
    assert not {path.rpartition(".")[2] for path in paths} & {"torch", "triton"}
