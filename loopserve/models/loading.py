"""Loading a model and its tokenizer by hub id, directory or bundled name; every failure is one line with its remedy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from loopserve.core.errors import ConfigError, ModelError
from loopserve.models.demo import bundled_path, is_bundled

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load(
    model: str,
    *,
    dtype: str = "auto",
    device: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, Any]:
    """(model, tokenizer), in evaluation mode. dtype ``auto`` is the checkpoint's own, but float32 for float16 on a CPU."""
    source = str(bundled_path(model)) if is_bundled(model) else model
    place = torch.device(_best_device() if device == "auto" else device)
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    if is_bundled(model):
        disable_progress_bar()  # two megabytes need none
    try:
        config = AutoConfig.from_pretrained(source, **options)
        wanted = _dtype(dtype, getattr(config, "dtype", None), place)
        loaded = AutoModelForCausalLM.from_pretrained(source, config=config, dtype=wanted, **options)
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
    except (OSError, ValueError, SafetensorError, RuntimeError, KeyError) as error:
        raise ModelError(f"cannot load model {model!r}: {_reason(error)}; {_remedy(model)}") from error
    loaded.to(place).eval()  # type: ignore[arg-type]  # the decorated method lost its signature
    return loaded, tokenizer


def _dtype(name: str, own: torch.dtype | None, device: torch.device) -> torch.dtype:
    if name != "auto":
        if name not in _DTYPES:
            raise ConfigError(f"unknown dtype {name!r} (known: auto, {', '.join(_DTYPES)})")
        return _DTYPES[name]
    if own is None or (own is torch.float16 and device.type == "cpu"):  # CPUs compute float16 slowly or not at all
        return torch.float32
    return own


def _best_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _reason(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".:") if lines else type(error).__name__


def _remedy(model: str) -> str:
    if is_bundled(model):
        return "the bundled model is damaged, reinstall loopserve"
    if Path(model).exists():
        return "check that the directory holds config.json, an intact *.safetensors file and a tokenizer"
    return "give a hub id, a directory, or 'demo' for the bundled model"
