"""Replace a file as a whole. After a crash, a full disk or a second writer it holds the old text or the new text, never a part."""

from __future__ import annotations

import errno
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_SUFFIX = ".loopserve-tmp"
_NO_SUCH_SUPPORT = (errno.EINVAL, errno.ENOTSUP)  # file systems without fsync or locks for directories


def write_atomically(path: str | Path, text: str | bytes, mode: int = 0o666) -> None:
    """Write ``text`` (UTF-8) or bytes into a file beside ``path``, flush it to the disk, and rename it over ``path``.

    mode: permissions of a new file, before the umask. Writers of one directory wait for each other, so that no two of them
    interleave. Links are followed and the permissions of an existing file are kept. A device or a pipe is written to directly.
    Raises OSError; ``path`` is unchanged in that case.
    """
    target = Path(os.path.realpath(path))
    data = text if isinstance(text, bytes) else text.encode()
    if target.exists() and not target.is_file() and not target.is_dir():
        target.write_bytes(data)
        return
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(target))
    with _directory(target.parent) as (directory, locked):
        if locked:
            _remove_leftovers(target)
        beside = target.with_name(f".{target.name[:40]}.{secrets.token_hex(8)}{_SUFFIX}")
        try:
            _write(beside, data, like=target, mode=mode)
            os.replace(beside, target)
        except BaseException:
            with suppress(OSError):
                beside.unlink()
            raise
        if directory is not None:
            _flush(directory)


def _write(path: Path, data: bytes, like: Path, mode: int) -> None:
    """Create ``path`` with these bytes and flush it to the disk. Take the permissions of ``like`` if that exists."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), mode)
    try:
        if like.exists():
            os.chmod(path, stat.S_IMODE(like.stat().st_mode))
        left = memoryview(data)
        while left:
            left = left[os.write(handle, left) :]
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _directory(path: Path) -> Iterator[tuple[int | None, bool]]:
    """Open and lock a directory. Return its descriptor, and whether the lock is held.

    A lock on the directory leaves no lock file beside the user's file. Directories cannot be opened or locked on Windows and on
    some network file systems. There the rename alone keeps every file whole.
    """
    try:
        directory = os.open(path, os.O_RDONLY)
    except OSError as error:
        if isinstance(error, FileNotFoundError | NotADirectoryError):
            raise
        yield None, False
        return
    try:
        yield directory, _locked(directory)
    finally:
        os.close(directory)  # releases the lock


def _locked(directory: int) -> bool:
    try:
        import fcntl

        fcntl.flock(directory, fcntl.LOCK_EX)
    except (ImportError, OSError):
        return False
    return True


def _remove_leftovers(target: Path) -> None:
    """Remove files beside ``target`` that a killed writer left. Call it with the lock held, since no other writer is active then."""
    for name in os.listdir(target.parent):
        if name.startswith(f".{target.name[:40]}.") and name.endswith(_SUFFIX):
            with suppress(OSError):
                (target.parent / name).unlink()


def _flush(directory: int) -> None:
    try:
        os.fsync(directory)
    except OSError as error:
        if error.errno not in _NO_SUCH_SUPPORT:
            raise
