"""The compiled library: found, or built at first use, and its functions by name.

Looked for in this order: beside this file (built when the package was installed), in the cache folder (``$LOOPSERVE_CACHE``, else
``$XDG_CACHE_HOME/loopserve``, else ``~/.cache/loopserve``), else built into the cache folder.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

from loopserve.kernels.native import build

INSTALLED = Path(__file__).parent / "_native.so"
_log = logging.getLogger("loopserve")


@cache
def unavailable() -> str | None:
    """Why there are no compiled kernels here; None if there are. Said once to the log."""
    try:
        _load()
    except build.BuildError as error:
        _log.warning("compiled kernels are not available (%s); plain PyTorch serves, several times slower", error)
        return str(error)
    return None


def describe() -> dict[str, str]:
    """Which library serves: keys path, level (its instruction set) and threads (openmp or one)."""
    library = _load()
    return {
        "path": library._name,
        "level": level(),
        "threads": "openmp" if library.ls_has_threads() else "one",
    }


@cache
def level() -> str:
    """The instruction set in use: the best that the library and the processor have, or the one ``$LOOPSERVE_CPU_LEVEL`` names."""
    return _usable(_load())[0]


def _usable(library: ctypes.CDLL) -> list[str]:
    """The library's instruction sets that the processor has and ``$LOOPSERVE_CPU_LEVEL`` allows, best first."""
    names: list[str] = library.ls_levels().decode().split()
    wanted = os.environ.get("LOOPSERVE_CPU_LEVEL")
    return [name for name in names if not wanted or name == wanted]


@cache
def function(name: str, *kinds: Any) -> Callable[..., Any]:
    """The C function ``ls_<name>`` of the instruction set in use, taking arguments of these ctypes kinds."""
    found: Callable[..., Any] = getattr(_load(), f"ls_{name}_{level()}")
    found.argtypes, found.restype = kinds, None  # type: ignore[attr-defined]
    return found


@cache
def call(name: str, *kinds: Any) -> Callable[..., None]:
    """Like ``function``, for one that answers whether memory ran out: MemoryError if so."""
    found = getattr(_load(), f"ls_{name}_{level()}")
    found.argtypes, found.restype = kinds, ctypes.c_int

    def checked(*arguments: Any) -> None:
        if found(*arguments):
            raise MemoryError(f"{name}: no memory for its scratch space")

    return checked


def threads() -> int:
    """How many threads a kernel may use: as many as torch does."""
    return torch.get_num_threads()


@cache
def _load() -> ctypes.CDLL:
    """Raises BuildError."""
    if INSTALLED.exists():
        library = _open(INSTALLED)
        if library is not None and _usable(library):
            return library
    compiler = build.find_compiler()
    target = cache_folder() / f"native-{_digest(compiler)}.so"
    if target.exists():
        library = _open(target)
        if library is not None:
            return library
    build.build(target, (build.machine_level(compiler),), compiler)
    library = _open(target)
    if library is None or not _usable(library):
        raise build.BuildError(f"{target} was built but cannot be used here")
    return library


def _open(path: Path) -> ctypes.CDLL | None:
    """The library at a path, None if it is not one built from these sources."""
    try:
        library = ctypes.CDLL(str(path))
        library.ls_digest.restype = library.ls_levels.restype = ctypes.c_char_p
        library.ls_has_threads.restype = ctypes.c_int
        return library if library.ls_digest().decode() == build.source_digest() else None
    except (OSError, AttributeError):
        return None


def cache_folder() -> Path:
    """Where a library built at first use is kept."""
    own = os.environ.get("LOOPSERVE_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "loopserve"


def _digest(compiler: str) -> str:
    """Changes with the sources, the compiler and the processor: a cache may be shared by machines."""
    version = build._run([compiler, "--version"]).partition("\n")[0]
    level = build.machine_level(compiler).name
    return hashlib.sha256(f"{build.source_digest()} {version} {level} {build.extra_flags()}".encode()).hexdigest()[:16]
