"""What cannot be loaded is refused with the reason and the remedy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import loopserve
from loopserve.core.errors import ConfigError, ModelError
from loopserve.core.policy.layers import LayerSpec, LayerType
from loopserve.models.loading import load


@pytest.mark.parametrize("name", ["/nowhere/at/all", "./nowhere", "~/nowhere-at-all", "nowhere/", "a/b/c"])
def test_a_directory_that_is_not_there(name: str) -> None:
    with pytest.raises(ModelError, match=f"cannot load model '{name}': there is no such directory; give a hub id"):
        load(name)


def test_a_file_in_place_of_a_directory(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")
    with pytest.raises(ModelError, match="it is a file; give the directory that holds it"):
        load(str(file))


@pytest.mark.parametrize("device", ["meta", torch.device("meta")])
def test_the_device_without_numbers(device: Any) -> None:
    with pytest.raises(ConfigError, match="device 'meta' holds no numbers"):
        load("demo", device=device)


@pytest.mark.parametrize("dtype", [torch.bfloat16, "bfloat16", "torch.bfloat16"])
def test_a_dtype_of_torch_is_taken(dtype: Any) -> None:
    model, _ = load("demo", dtype=dtype, device=torch.device("cpu"))
    assert model.dtype is torch.bfloat16


@pytest.mark.parametrize("dtype", ["int8", torch.int8, "bf17"])
def test_an_unknown_dtype_lists_the_known(dtype: Any) -> None:
    with pytest.raises(ConfigError, match=r"unknown dtype '\w+' \(known: auto, float32, bfloat16, float16\)"):
        load("demo", dtype=dtype)


def test_a_model_that_is_none() -> None:
    with pytest.raises(ModelError, match="Linear is no transformers model"), loopserve.apply(torch.nn.Linear(2, 2)):  # type: ignore[arg-type]
        pass


@pytest.mark.parametrize("pattern", ["sfsf", "ssff", "fsff", "ffff"])
def test_quest_is_served_where_the_first_layers_slide(pattern: str) -> None:
    kinds = [LayerType.SLIDING if each == "s" else LayerType.FULL for each in pattern]
    layers = [LayerSpec(index, kind, 4, 2, 8) for index, kind in enumerate(kinds)]
    loopserve.load_stack("quest").check(layers)
    stack = {
        "prefill": {"policy": "dense"},
        "decode": {"policy": "full"},
        "layers": [{"at": [0, 1], "decode": {"policy": "snapkv"}}],
    }
    if "s" in pattern[:2]:
        with pytest.raises(ConfigError, match="sliding_attention layer, which stays as the model has it"):
            loopserve.load_stack(stack).check(layers)
