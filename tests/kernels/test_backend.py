"""One place decides which implementation runs, and says why."""

from __future__ import annotations

import pytest
import torch

from loopserve.kernels import backend


def test_an_unknown_backend_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOOPSERVE_KERNELS", "cuda13")
    with pytest.raises(ValueError, match=r"'cuda13' is unknown \(known: auto, reference, cpu\)"):
        backend.chosen()
    with pytest.raises(ValueError, match="'fast' is unknown"), backend.use("fast"):
        pass


def test_the_variable_and_the_override_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    operation = backend.Operation("twice", reference=lambda x: x, cpu=lambda x: x)
    single = torch.zeros(1)
    assert operation.pick(single) is operation.cpu
    monkeypatch.setenv("LOOPSERVE_KERNELS", "reference")
    assert operation.pick(single) is operation.reference
    with backend.use("cpu"):
        assert operation.pick(single) is operation.cpu
        assert operation.pick(single.double()) is operation.reference
        assert operation.choose("cuda", torch.float32)[0] is operation.reference
    assert operation.pick(single) is operation.reference


def test_every_operation_says_what_serves_it_and_why() -> None:
    rows = {row["operation"]: row for row in backend.describe()}
    assert set(rows) == {
        "block_sparse",
        "decode_attention",
        "dense_attention",
        "gather_kv",
        "line_scores",
        "select_lines",
        "token_scores",
        "vertical_slash",
    }
    assert {row["implementation"] for row in rows.values()} == {"cpu"}
    with backend.use("reference"):
        assert {row["why"] for row in backend.describe()} == {"LOOPSERVE_KERNELS=reference"}
    on_gpu = {row["operation"]: row["why"] for row in backend.describe("cuda")}
    assert on_gpu["vertical_slash"] == "no implementation for cuda yet"
