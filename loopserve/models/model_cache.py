"""Keep downloaded and converted models in the user's cache folder. Each appears there whole or not at all.

The folder is ``models`` in the cache folder of the compiled kernels: ``$LOOPSERVE_CACHE``, else ``$XDG_CACHE_HOME/loopserve``,
else ``~/.cache/loopserve``.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from loopserve.core.errors import ModelError
from loopserve.kernels.native.library import cache_folder

_UNFINISHED = ".unfinished-"


def models_folder() -> Path:
    """Return the folder of cached models. It need not exist."""
    return cache_folder() / "models"


def announce(text: str) -> None:
    """Print one line about work that takes long, on stderr."""
    print(text, file=sys.stderr, flush=True)


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Hold the only right to write into ``folder``, which is created. Other processes wait.

    Raises ModelError, with the folder's name, for any OSError inside.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / ".lock", "ab") as lock:
            _acquire(lock.fileno(), folder)
            for leftover in folder.glob(
                f"{_UNFINISHED}*"
            ):  # of a process that was killed, since no other one is writing
                remove(leftover)
            yield
    except OSError as error:
        raise ModelError(
            f"cannot keep models in {str(folder)!r}: {error.strerror or error}; "
            "make space or permit writing there, or name another folder in LOOPSERVE_CACHE"
        ) from error


def _acquire(handle: int, folder: Path) -> None:
    try:
        import fcntl
    except ImportError:  # without locks the last of two writers wins, and each writes whole folders
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        announce(f"waiting for another process that writes into {folder}")
        fcntl.flock(handle, fcntl.LOCK_EX)
    except OSError:
        return  # a file system without locks


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Yield an empty folder beside ``target`` that replaces it at the end of the block. After an exception it is removed.

    Use it inside ``writing(target.parent)``.
    """
    beside = target.with_name(f"{_UNFINISHED}{secrets.token_hex(8)}")
    beside.mkdir()
    try:
        yield beside
        remove(target)
        os.replace(beside, target)
    finally:
        remove(beside)


def remove(path: Path) -> None:
    """Delete a file or a folder, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        with suppress(FileNotFoundError):
            path.unlink()


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file's content, 64 hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def size_of(path: Path) -> int:
    """Return the bytes of a file, or of all files in a folder. Return 0 if there is neither."""
    if path.is_file():
        return path.stat().st_size
    return sum(each.stat().st_size for each in path.rglob("*") if each.is_file())
