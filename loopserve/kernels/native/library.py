"""Load the compiled library, or build it at first use; return its functions by name, and pass tensors to them.

The library is searched in this order:

1. beside this file, where a platform wheel installs it;
2. in the cache folder, as built by this machine's compiler (the file name depends on sources, compiler, flags and
   instruction set);
3. built into the cache folder;
4. without a working compiler: any library of the cache folder built from these sources with these flags for an
   instruction set of this processor. This serves later stages of container images and machines without development
   tools.

The cache folder is ``$LOOPSERVE_CACHE``, else ``$XDG_CACHE_HOME/loopserve``, else ``~/.cache/loopserve``. A JSON record
beside each library describes its build.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import logging
import mmap
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loopserve.kernels.native import build

INSTALLED = Path(__file__).parent / "_native.so"
_log = logging.getLogger("loopserve")
MOST_COLUMNS = 2**31 - 2**16  # the C sources count columns in int32, some up to a tile past the last
_LARGE = 4 << 20  # bytes; below, the call for huge pages costs more than it saves


@cache
def unavailable() -> str | None:
    """Return why compiled kernels are unavailable, or None. Logs the reason once."""
    try:
        _load()
    except build.BuildError as error:
        _log.warning("compiled kernels are not available (%s); plain PyTorch serves, several times slower", error)
        return str(error)
    return None


def describe() -> dict[str, str]:
    """Return the library in use: keys path, level (instruction set), threads (openmp or one) and, where recorded,
    compiler.
    """
    library = _load()
    record = _record(Path(library._name))
    return {
        "path": library._name,
        "level": level(),
        "threads": "openmp" if library.ls_has_threads() else "one",
    } | ({"compiler": record["compiler"]} if record is not None else {})


def build_into_cache(*, every_level: bool = False) -> Path:
    """Compile the kernels into the cache folder and return the path of the library. Raises BuildError.

    every_level: build for all instruction sets of the architecture, as an image for several machines needs; else for
    this machine's.
    """
    compiler = build.find_compiler()
    wanted = build.levels() if every_level else (build.machine_level(compiler),)
    target = _target(compiler, wanted)
    _build(target, wanted, compiler)
    found = _open(target)
    if isinstance(found, str):
        raise build.BuildError(f"{target} was built but cannot be used here: {found}")
    return target


@cache
def level() -> str:
    """Return the instruction set in use: the best of library and processor, or the one that ``$LOOPSERVE_CPU_LEVEL``
    names.
    """
    return _usable(_load())[0]


def _usable(library: ctypes.CDLL) -> list[str]:
    """Return the library's instruction sets that the processor has and ``$LOOPSERVE_CPU_LEVEL`` allows, best first."""
    names: list[str] = library.ls_levels().decode().split()
    wanted = os.environ.get("LOOPSERVE_CPU_LEVEL")
    return [name for name in names if not wanted or name == wanted]


@cache
def function(name: str, *kinds: Any) -> Callable[..., Any]:
    """Return the C function ``ls_<name>`` of the instruction set in use, with arguments of these ctypes kinds."""
    found: Callable[..., Any] = getattr(_load(), f"ls_{name}_{level()}")
    found.argtypes, found.restype = kinds, None  # type: ignore[attr-defined]
    return found


@cache
def call(name: str, *kinds: Any) -> Callable[..., None]:
    """Return a function like ``function`` that raises MemoryError where the C function reports that memory ran out."""
    found = getattr(_load(), f"ls_{name}_{level()}")
    found.argtypes, found.restype = kinds, ctypes.c_int

    def checked(*arguments: Any) -> None:
        if found(*arguments):
            raise MemoryError(f"{name}: no memory for its scratch space")

    return checked


def threads() -> int:
    """Return how many threads a kernel may use: as many as torch uses."""
    return torch.get_num_threads()


@cache
def _load() -> ctypes.CDLL:
    """Load the library. Raises BuildError."""
    if INSTALLED.exists():
        library = _open(INSTALLED)
        if isinstance(library, ctypes.CDLL):
            return library
    try:
        return _own()
    except build.BuildError as error:
        found, refused = _any_cached()
        if found is None:
            raise build.BuildError("; ".join([str(error), *refused])) from error
        return found


def _own() -> ctypes.CDLL:
    """Return this machine's library, from the cache or newly built. Raises BuildError."""
    compiler = build.find_compiler()
    wanted = (build.machine_level(compiler),)
    for levels in (wanted, build.levels()):
        library = _open(_target(compiler, levels))
        if isinstance(library, ctypes.CDLL):
            return library
    target = _target(compiler, wanted)
    _build(target, wanted, compiler)
    library = _open(target)
    if isinstance(library, str):
        raise build.BuildError(f"{target} was built but cannot be used here: {library}")
    return library


def _any_cached() -> tuple[ctypes.CDLL | None, list[str]]:
    """Return the cached library with the best instruction set for this processor, and why matching ones were rejected."""
    best: ctypes.CDLL | None = None
    refused: list[str] = []
    ranks = [each.name for each in build.levels()]
    for path in sorted(cache_folder().glob("native-*.so")):
        record = _record(path)
        if record is None or record["sources"] != build.source_digest() or record["flags"] != list(build.extra_flags()):
            continue
        library = _open(path)
        if isinstance(library, str):
            refused.append(f"{path} cannot be used: {library}")
        elif best is None or ranks.index(_usable(library)[0]) < ranks.index(_usable(best)[0]):
            best = library
    return best, refused


def _open(path: Path) -> ctypes.CDLL | str:
    """Return the library at a path, or why it is unusable: missing, other sources, or no instruction set of this
    processor.
    """
    if not path.exists():
        return "it is not there"
    try:
        library = ctypes.CDLL(str(path))
        library.ls_digest.restype = library.ls_levels.restype = ctypes.c_char_p
        library.ls_has_threads.restype = ctypes.c_int
        digest = library.ls_digest().decode()
    except (OSError, AttributeError) as error:  # a missing libgomp, another C library, not a library
        return str(error)
    if digest != build.source_digest():
        return "it was built of other sources"
    return (
        library
        if _usable(library)
        else "it has no instruction set that this processor has and LOOPSERVE_CPU_LEVEL allows"
    )


def cache_folder() -> Path:
    """Return the folder of libraries built at first use."""
    own = os.environ.get("LOOPSERVE_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "loopserve"


def _target(compiler: str, levels: tuple[build.Level, ...]) -> Path:
    """Return the path of a library.

    It depends on everything in its record, since machines and versions may share a cache.
    """
    made_by = json.dumps(_made_by(compiler, levels), sort_keys=True)
    return cache_folder() / f"native-{hashlib.sha256(made_by.encode()).hexdigest()[:16]}.so"


def _made_by(compiler: str, levels: tuple[build.Level, ...]) -> dict[str, Any]:
    return {
        "sources": build.source_digest(),
        "compiler": build.compiler_version(compiler),
        "levels": [level.name for level in levels],
        "flags": list(build.extra_flags()),
    }


def _build(target: Path, levels: tuple[build.Level, ...], compiler: str) -> None:
    """Build a library and write its record. Raises BuildError."""
    build.build(target, levels, compiler)
    record = target.with_suffix(".json")
    beside = record.with_name(f"{record.name}.{os.getpid()}")  # replaced atomically
    try:
        beside.write_text(json.dumps(_made_by(compiler, levels), indent=1) + "\n", encoding="utf-8")
        os.replace(beside, record)
    except OSError as error:
        raise build.BuildError(f"cannot write {record}: {error.strerror}") from error


def _record(path: Path) -> dict[str, Any] | None:
    """Return the build record of a library, or None where there is none."""
    try:
        found = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    whole = isinstance(found, dict) and found.keys() >= {"sources", "compiler", "levels", "flags"}
    return found if whole else None


def rows_of(tensor: Tensor) -> Tensor:
    """Return the tensor if its last dimension is dense, else a copy with a dense last dimension."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def number_type(tensor: Tensor) -> torch.dtype:
    """Return the dtype of a tensor if the C sources support it. Raises ValueError for any other."""
    if tensor.dtype is torch.float32 or tensor.dtype is torch.bfloat16:
        return tensor.dtype
    raise ValueError(f"the compiled kernels read float32 and bfloat16, not {tensor.dtype}")


def address(
    name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...], *, strided: int = 0, written: bool = False
) -> int:
    """Return the address of a tensor's first number.

    Raises ValueError unless dtype, device, shape and strides fit the C kernel.

    strided: number of leading dimensions whose strides are passed to C. The other dimensions must be contiguous.
    written: C writes into the tensor, so no two of its numbers may share memory.
    """
    fits = tensor.dtype is dtype and tensor.shape == shape and tensor.is_cpu and not tensor.is_neg()
    if fits and strided and strided == tensor.dim() - 1 and tensor.stride(-1) == 1 and not written:
        dense = True  # the common case, checked in every step of every layer
    else:
        dense = fits and (_dense_behind(tensor, strided, written) if strided else tensor.is_contiguous())
    if not dense:
        held = f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}, strides {list(tensor.stride())}"
        layout = f"dense behind {strided} dimensions" if strided else "contiguous"
        raise ValueError(f"{name} must be {dtype} {list(shape)} on cpu, {layout}; got {held}")
    place = tensor.data_ptr()
    if not place and tensor.numel():
        raise ValueError(f"{name} {list(shape)} has no memory: its storage was freed")
    return place


def fresh(*shape: int, dtype: torch.dtype) -> tuple[Tensor, int]:
    """Return a new tensor for a kernel to write, and its address."""
    tensor = torch.empty(shape, dtype=dtype, device="cpu")
    return tensor, tensor.data_ptr()


def rows_address(
    name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...], kept: list[Tensor]
) -> tuple[int, int, int]:
    """Return the address of a tensor ``[heads, rows, numbers]`` and the strides of heads and rows, checked as by ``address``.

    Where the numbers of a row are not adjacent, these are of a copy, which is added to ``kept``: it must stay alive during the call.
    """
    head, row, number = tensor.stride()
    if number != 1:
        tensor = tensor.contiguous()
        kept.append(tensor)
        head, row, number = tensor.stride()
    fits = tensor.dtype is dtype and tensor.shape == shape and number == 1 and tensor.is_cpu and not tensor.is_neg()
    place = tensor.data_ptr() if fits else 0
    return place or address(name, tensor, dtype, shape, strided=2), head, row  # which says what does not fit


def places(*tensors: Tensor) -> tuple[int, ...]:
    """Return where tensors lie now, without a check: only to compare with addresses that were checked."""
    return tuple(map(Tensor.data_ptr, tensors))


def optional(
    name: str,
    tensor: Tensor | None,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    *,
    strided: int = 0,
    written: bool = False,
) -> int | None:
    """Return the address as ``address`` does, or None for None."""
    return None if tensor is None else address(name, tensor, dtype, shape, strided=strided, written=written)


def _dense_behind(tensor: Tensor, strided: int, written: bool) -> bool:
    """Return whether the dimensions after the first ``strided`` are contiguous."""
    expected = 1
    sizes, strides = tensor.shape, tensor.stride()
    for dim in range(tensor.dim() - 1, strided - 1, -1):
        if sizes[dim] != 1 and strides[dim] != expected:
            return False
        expected *= sizes[dim]
    # Where C writes, the leading dimensions must not overlap: a tensor that was expanded has strides of 0.
    if written:
        for dim in range(strided - 1, -1, -1):
            if sizes[dim] != 1 and strides[dim] < expected:
                return False
            expected = max(expected, sizes[dim] * strides[dim])
    return True


def large_pages(tensor: Tensor) -> Tensor:
    """Ask the system to back a newly allocated tensor with huge pages, and return the tensor.

    With 4 KiB pages, first touches and scattered reads cost more than the computation. Does
    nothing for small tensors, for other devices, or where the system has no huge pages.
    """
    size = tensor.untyped_storage().nbytes()
    if size >= _LARGE and tensor.device.type == "cpu":
        advise = _advise()
        if advise is not None:
            start = -(-tensor.untyped_storage().data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
            advise(start, size - 2 * mmap.PAGESIZE, mmap.MADV_HUGEPAGE)
    return tensor


@cache
def _advise() -> Any:
    """Return ``madvise`` of the C library, or None where there are no huge pages."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    try:
        found = ctypes.CDLL(None).madvise
    except (OSError, AttributeError):
        return None
    found.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return found
