"""Which dtype ``auto`` is: on a CPU bfloat16 where it is multiplied and float32 elsewhere, on other devices the checkpoint's own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from loopserve.core.errors import ConfigError
from loopserve.models import loading
from loopserve.models.demo import bundled_path
from loopserve.models.loading import load


@pytest.fixture(autouse=True)
def without_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOOPSERVE_DTYPE", raising=False)


@pytest.fixture(scope="module", params=["float32", "bfloat16", "float16"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The bundled model, saved in a dtype."""
    folder = tmp_path_factory.mktemp(request.param)
    model, tokenizer = load("demo", dtype=request.param)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def pretend(monkeypatch: pytest.MonkeyPatch, machine: str, *instructions: str) -> None:
    monkeypatch.setattr(loading.platform, "machine", lambda: machine)
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda name=name: name in instructions, raising=False)


@pytest.mark.parametrize("instructions", ["_is_avx512_bf16_supported", "_is_amx_tile_supported"])
def test_a_cpu_with_bfloat16_products_takes_bfloat16_and_says_so_in_a_line(
    checkpoint: str, instructions: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pretend(monkeypatch, "x86_64", instructions)
    assert load(checkpoint, device="cpu")[0].dtype is torch.bfloat16
    (line,) = [each for each in capsys.readouterr().err.splitlines() if "bfloat16" in each]
    assert line.startswith(checkpoint) and "--dtype float32 or LOOPSERVE_DTYPE=float32" in line


@pytest.mark.parametrize("machine", ["x86_64", "AMD64", "riscv64"])
def test_a_cpu_without_them_takes_float32_and_says_so_in_a_line(
    checkpoint: str, machine: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pretend(monkeypatch, machine)
    assert load(checkpoint, device="cpu")[0].dtype is torch.float32
    (line,) = [each for each in capsys.readouterr().err.splitlines() if "emulates bfloat16" in each]
    assert line.startswith(checkpoint) and "--dtype bfloat16 or LOOPSERVE_DTYPE=bfloat16" in line


def test_a_dtype_that_is_named_is_taken(
    checkpoint: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pretend(monkeypatch, "x86_64")
    assert load(checkpoint, dtype="bfloat16", device="cpu")[0].dtype is torch.bfloat16
    monkeypatch.setenv("LOOPSERVE_DTYPE", "bfloat16")
    assert load(checkpoint, device="cpu")[0].dtype is torch.bfloat16
    assert load(checkpoint, dtype="float32", device="cpu")[0].dtype is torch.float32
    assert "this CPU" not in capsys.readouterr().err
    monkeypatch.setenv("LOOPSERVE_DTYPE", "auto")
    assert load(checkpoint, device="cpu")[0].dtype is torch.float32


def test_a_wrong_variable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOOPSERVE_DTYPE", "bf17")
    with pytest.raises(ConfigError, match="LOOPSERVE_DTYPE: unknown dtype 'bf17'"):
        load(str(Path(bundled_path("demo"))))


@pytest.mark.parametrize("instructions", [(), ("_is_avx512_bf16_supported",)])
def test_the_bundled_model_is_float32_on_every_cpu(
    instructions: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pretend(monkeypatch, "x86_64", *instructions)
    assert load("demo", device="cpu")[0].dtype is torch.float32
    assert "this CPU" not in capsys.readouterr().err


def test_another_device_keeps_the_checkpoints_own(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "x86_64")
    assert loading._dtype("auto", torch.bfloat16, torch.device("cuda"), "m") is torch.bfloat16


@pytest.mark.parametrize("supported", [True, False])
def test_aarch64_asks_onednn(supported: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "aarch64")
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: supported, raising=False)
    assert loading.has_bfloat16_products() is supported
