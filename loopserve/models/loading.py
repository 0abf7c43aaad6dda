"""Load a model and its tokenizer by hub id, directory, GGUF file or name. Each error message is one line with a remedy."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from loopserve.core.errors import ConfigError, ModelError
from loopserve.core.policy.layers import LayerSpec
from loopserve.models.catalog import CATALOG, named_directory
from loopserve.models.conversion import converted
from loopserve.models.demo import bundled_path, is_bundled
from loopserve.models.few_rows import serve_few_rows
from loopserve.models.layers import read_layers
from loopserve.models.model_cache import announce
from loopserve.models.quantised import quantise, require_format

DTYPE_VARIABLE = "LOOPSERVE_DTYPE"  # what ``auto`` means, if it is set
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load(
    model: str,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    weights: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, Any]:
    """Return (model, tokenizer), in evaluation mode.

    dtype: ``auto`` is LOOPSERVE_DTYPE if the environment sets it. Else it is, on a CPU, bfloat16 where that multiplies it and float32
    elsewhere, and a line on stderr says which; on another device the checkpoint's own. The bundled models are float32 on every CPU.
    weights: ``auto`` leaves them as they are; ``int8`` and ``int4`` quantise those of linear layers (CPU only; ``models.quantised``),
    and a line on stderr says how many.
    Raises ModelError for a model that cannot be loaded, ConfigError for an unknown dtype, device or format of weights, or one that
    does not serve here. All name a remedy.
    """
    require_format(weights)
    source = _source(model)
    place = _device(device)
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    if is_bundled(model):
        disable_progress_bar()  # the bundled models have two megabytes
    try:
        config = AutoConfig.from_pretrained(source, **options)
        wanted = _dtype(dtype, getattr(config, "dtype", None), place, model)
        # It is a tuple only with output_loading_info, which the stubs do not express.
        result: Any = AutoModelForCausalLM.from_pretrained(
            source, config=config, dtype=wanted, output_loading_info=True, **options
        )
        loaded, report = result
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
    except ConfigError:
        raise
    except Exception as error:  # a parser may raise anything for a damaged file
        raise ModelError(f"cannot load model {model!r}: {_reason(error)}; {_remedy(model)}") from error
    absent = sorted(report["missing_keys"]) + sorted(str(key) for key in report["mismatched_keys"])
    if absent:
        raise ModelError(
            f"cannot load model {model!r}: its weights lack {absent[0]} and {len(absent) - 1} more; {_remedy(model)}"
        )
    loaded.to(place).eval()
    if weights != "auto":
        announce(f"{model}: {quantise(loaded, weights).said}")
    serve_few_rows(loaded)
    return loaded, tokenizer


def load_layers(model: str, *, revision: str | None = None, trust_remote_code: bool = False) -> tuple[LayerSpec, ...]:
    """Return the attention layers of a model by hub id, directory, GGUF file or name. Its weights are not read.

    Raises ModelError if the configuration cannot be loaded, or describes layers that loopserve cannot serve.
    """
    source = _source(model)
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(source, **options)
        with torch.device("meta"):
            shape = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:  # a parser may raise anything for a damaged file
        raise ModelError(
            f"cannot read the configuration of model {model!r}: {_reason(error)}; {_remedy(model)}"
        ) from error
    return read_layers(shape)


def _source(model: str) -> str:
    """Return a hub id, or the directory of a path, of a GGUF file's converted copy, or of a name.

    A GGUF file is converted and a named model is downloaded at the first use. Raises ModelError for a path that does not exist.
    """
    text = str(model)
    if is_bundled(text):
        return str(bundled_path(text))
    if text in CATALOG:
        return str(named_directory(text))
    path = Path(text).expanduser()
    if text.endswith(".gguf") and not path.is_dir():
        return str(converted(path))
    if path.is_file():
        raise ModelError(
            f"cannot load model {text!r}: it is a file; give the directory that holds it, {str(path.parent)!r}"
        )
    is_path = path.is_absolute() or text.startswith((".", "~")) or text.endswith(("/", "\\")) or text.count("/") > 1
    if is_path and not path.exists():
        raise ModelError(f"cannot load model {text!r}: there is no such directory; {_remedy(text)}")
    return str(path) if path.exists() else text


def _device(name: str | torch.device) -> torch.device:
    try:
        place = torch.device(_best_device() if name == "auto" else name)
        if place.type == "meta":
            raise ConfigError(
                f"device 'meta' holds no numbers, so nothing can be computed there; use auto or {_best_device()}"
            )
        torch.empty(0, dtype=torch.float32, device=place)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"device {str(name)!r} is unknown or not there ({_reason(error)}); use auto or {_best_device()}"
        ) from error
    return place


def has_bfloat16_products() -> bool:
    """Return whether the CPU multiplies bfloat16 matrices with instructions of its own (AVX512-BF16, AMX, AArch64's BF16)."""
    machine = platform.machine().lower()
    if machine in ("x86_64", "amd64"):
        checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        return any(getattr(torch.cpu, name, bool)() for name in checks)
    if machine in ("aarch64", "arm64"):
        try:
            return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
        except (AttributeError, RuntimeError):  # a torch without oneDNN, whose own products are emulated
            return False
    return False


def _dtype(name: str | torch.dtype, own: torch.dtype | None, device: torch.device, model: str) -> torch.dtype:
    given, source = str(name).removeprefix("torch."), ""
    if given == "auto" and os.environ.get(DTYPE_VARIABLE):
        given, source = os.environ[DTYPE_VARIABLE], f"{DTYPE_VARIABLE}: "
    if given != "auto":
        if given not in DTYPES:
            raise ConfigError(f"{source}unknown dtype {given!r} (known: auto, {', '.join(DTYPES)})")
        return DTYPES[given]
    if device.type != "cpu":
        return own or torch.float32
    if is_bundled(model):  # too small to gain from fewer bytes
        return torch.float32
    chosen, other, reason = "float32", "bfloat16", "since this CPU only emulates bfloat16"
    if has_bfloat16_products():
        chosen, other, reason = "bfloat16", "float32", "which this CPU multiplies"
    announce(f"{model}: {chosen}, {reason}; change it with --dtype {other} or {DTYPE_VARIABLE}={other}")
    return DTYPES[chosen]


def _best_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _reason(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".:") if lines else type(error).__name__


def _remedy(model: str) -> str:
    if is_bundled(model):
        return "the bundled model is damaged, reinstall loopserve"
    if model in CATALOG:
        return f"remove the cached copy with: loopserve models rm {model}"
    if Path(model).exists():
        return "check that the directory holds config.json, an intact *.safetensors file and a tokenizer"
    return "give a hub id, a directory, a .gguf file, or a name of loopserve models ls"
