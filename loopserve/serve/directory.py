"""Share a session directory: several servers may use one, and only one that is alone clears it of what killed writers left."""

from __future__ import annotations

import os
from pathlib import Path


class SharedDirectory:
    """Hold a session directory as one of its users, from construction to ``close`` or the end of the process.

    alone: no other process held it at the beginning. It stays so until ``share`` is called; others wait that long.
    """

    def __init__(self, directory: Path | None) -> None:
        """directory: None for a server without one. Where the file system has no locks, nobody counts as alone."""
        self.alone = False
        self._lock: int | None = None
        if directory is None:
            return
        self._lock = os.open(directory / "lock", os.O_CREAT | os.O_RDWR, 0o600)
        try:
            self.alone = self._flock(exclusive=True)
            if not self.alone:
                self._flock(exclusive=False)
        except (ImportError, OSError):
            self.alone = False

    def share(self) -> None:
        """Let other processes use the directory as well."""
        if self.alone:
            self._flock(exclusive=False)

    def close(self) -> None:
        """Leave the directory. May be called twice."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _flock(self, *, exclusive: bool) -> bool:
        import fcntl

        assert self._lock is not None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB if exclusive else fcntl.LOCK_SH)
        except BlockingIOError:
            return False
        return True
