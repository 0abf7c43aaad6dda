"""SmolLM2 in float32 and prose in the public domain. Where the model cannot be had, the run ends with one line."""

from __future__ import annotations

import os
from importlib.resources import files
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from loopserve.core.errors import ModelError
from loopserve.models.loading import load

torch.set_num_threads(min(2, os.cpu_count() or 1))


def _load() -> tuple[PreTrainedModel, Any]:
    try:
        return load("smollm2", dtype="float32", device="cpu")
    except ModelError as error:
        pytest.exit(f"make test-real needs SmolLM2: {error}", returncode=1)


@pytest.fixture(scope="session")
def plain() -> tuple[PreTrainedModel, Any]:
    """The model as transformers has it. No engine may take it over."""
    return _load()


@pytest.fixture(scope="session")
def served() -> tuple[PreTrainedModel, Any]:
    """Another copy, for engines."""
    return _load()


@pytest.fixture(scope="session")
def prose() -> str:
    """Three chapters of Moby-Dick, about 3,500 tokens."""
    folder = files("loopserve.bench") / "data" / "moby_dick"
    return "\n\n".join((folder / f"chapter_{number}.txt").read_text(encoding="utf-8") for number in ("07", "12", "14"))
