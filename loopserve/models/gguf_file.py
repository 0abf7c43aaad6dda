"""Read and check a GGUF file before it is converted. Each error names the file, the fault and the remedy in one line."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from loopserve.core.errors import ModelError

_MAGIC = b"GGUF"
_PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")
_ORIGINAL = "give the hub id or directory of the original model"
_PACKAGES = ("gguf", "accelerate")  # what transformers needs to load a GGUF file


@dataclass(frozen=True)
class GgufFile:
    """Hold the metadata of a complete GGUF file. ``dtype`` is the narrowest type that holds its weights exactly."""

    path: Path
    metadata: dict[str, Any]
    dtype: torch.dtype

    @property
    def architecture(self) -> str:
        return str(self.metadata["general.architecture"])

    @property
    def name(self) -> str:
        return str(self.metadata.get("general.name", self.path.stem))


def check_packages(model: str) -> None:
    """Raise ModelError unless the packages that convert GGUF files are installed."""
    absent = [name for name in _PACKAGES if find_spec(name) is None]
    if absent:
        raise ModelError(
            f"cannot load model {model!r}: GGUF files need the package {' and '.join(absent)}; pip install 'loopserve[gguf]'"
        )


def check_header(path: Path) -> None:
    """Raise ModelError for a file that is missing, not GGUF, or one part of several. Only its first bytes are read."""
    if not path.is_file():
        raise _refusal(path, "there is no such file", "check the path")
    if part := _PART.search(path.name):
        raise _split(path, int(part[1]), int(part[2]))
    try:
        with open(path, "rb") as file:
            head = file.read(200)
    except OSError as error:
        raise _refusal(path, error.strerror or str(error), "permit reading it") from error
    if head.startswith(b"version https://git-lfs"):
        raise _refusal(path, "it is a pointer of Git LFS instead of the model", "run git lfs pull where it comes from")
    if not head:
        raise _refusal(path, "the file is empty", "download it again")
    if not head.startswith(_MAGIC):
        raise _refusal(path, "it is no GGUF file (it does not begin with GGUF)", f"download it again, or {_ORIGINAL}")


def read_gguf(path: Path) -> GgufFile:
    """Return the metadata of a GGUF file. Raises ModelError unless it is complete, one whole model, and holds a tokenizer."""
    check_header(path)
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
        metadata = {key: field.contents() for key, field in reader.fields.items()}
        kinds = {each.tensor_type.name for each in reader.tensors if len(each.shape) > 1}
        end = max((each.data_offset + each.n_bytes for each in reader.tensors), default=0)
    except Exception as error:  # the reader raises whatever the wrong bytes lead to
        raise _refusal(path, f"it is truncated or damaged ({_size(path)})", "download it again") from error
    if end > path.stat().st_size:
        raise _refusal(path, f"it is truncated ({_size(path)} of {end:,})", "download it again")
    if int(metadata.get("split.count") or 1) > 1:
        raise _split(path, int(metadata.get("split.no", 0)) + 1, int(metadata["split.count"]))
    kind = metadata.get("general.type", "model")
    if kind != "model" or not kinds or "general.architecture" not in metadata:
        fault = f"it is of the kind {kind!r}" if kind != "model" else "it holds no weights or names no architecture"
        raise _refusal(path, f"{fault}, so no whole model", "give the file of the language model itself")
    if not metadata.get("tokenizer.ggml.tokens") or not metadata.get("tokenizer.ggml.model"):
        raise _refusal(path, "it holds no tokenizer", f"convert the model again with its tokenizer, or {_ORIGINAL}")
    dtype = _exact_dtype(reader.tensors, kinds)
    return GgufFile(path, metadata, dtype)


def _exact_dtype(tensors: Any, kinds: set[str]) -> torch.dtype:
    """Return the type of matrices that are all F16 or all BF16, if it holds the float32 vectors exactly too; else float32."""
    names = {"F16": torch.float16, "BF16": torch.bfloat16}
    dtype = names.get(next(iter(kinds)), torch.float32) if len(kinds) == 1 else torch.float32
    for each in tensors:
        if each.tensor_type.name == "F32":
            vector = torch.tensor(each.data, dtype=torch.float32, device="cpu")
            if not torch.equal(vector.to(dtype).float(), vector):
                return torch.float32
    return dtype


def incomplete(file: GgufFile, absent: list[str]) -> ModelError:
    """Return the error for a file without some weights of its architecture."""
    return _refusal(file.path, f"its weights lack {absent[0]} and {len(absent) - 1} more", "download it again")


def unsupported(file: GgufFile, reason: str) -> ModelError:
    """Return the error for a model that transformers cannot build from a GGUF file."""
    return _refusal(file.path, f"its architecture {file.architecture!r} cannot be loaded ({reason})", _ORIGINAL)


def unreadable_tokenizer(file: GgufFile, reason: str) -> ModelError:
    """Return the error for a tokenizer that cannot be built from the metadata."""
    return _refusal(file.path, f"its tokenizer cannot be built ({reason})", _ORIGINAL)


def _split(path: Path, part: int, count: int) -> ModelError:
    return _refusal(
        path, f"it is part {part} of {count} of a split model", "merge the parts first (llama-gguf-split --merge)"
    )


def _refusal(path: Path, fault: str, remedy: str) -> ModelError:
    return ModelError(f"cannot load model {str(path)!r}: {fault}; {remedy}")


def _size(path: Path) -> str:
    return f"{path.stat().st_size:,} bytes"
