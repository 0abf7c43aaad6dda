"""A file that is written anew holds its old text or its new one, whatever breaks off the writing."""

from __future__ import annotations

import errno
import os
import random
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from loopserve.core.atomic_file import write_atomically

OLD = "old\n" * 100


@pytest.fixture
def file(tmp_path: Path) -> Path:
    file = tmp_path / "talk.json"
    file.write_text(OLD)
    return file


def test_it_writes_new_files_and_replaces_old_ones(tmp_path: Path, file: Path) -> None:
    write_atomically(tmp_path / "new.json", "naïve 文\n")
    assert (tmp_path / "new.json").read_text(encoding="utf-8") == "naïve 文\n"
    write_atomically(str(file), "short\n")
    assert file.read_text() == "short\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new.json", "talk.json"]


def full(*arguments: Any) -> int:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("call", ["write", "fsync", "replace", "open"])
def test_a_full_disk_leaves_the_earlier_file_whole(file: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    real = getattr(os, call)

    def fails(*arguments: Any, **options: Any) -> Any:
        first = str(arguments[0])
        return full() if call != "open" or first.endswith("-tmp") else real(*arguments, **options)

    monkeypatch.setattr(os, call, fails)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(file, "new\n" * 1000)
    monkeypatch.undo()
    assert file.read_text() == OLD and list(file.parent.iterdir()) == [file]


def test_a_disk_that_fills_up_in_the_midst_of_it(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, left = os.write, [3]

    def fails(handle: int, data: Any) -> int:
        left[0] -= 1
        return real(handle, data[:10]) if left[0] else full()

    monkeypatch.setattr(os, "write", fails)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(file, "new\n" * 1000)
    assert file.read_text() == OLD and list(file.parent.iterdir()) == [file]


def test_pieces_that_the_system_takes_are_put_together(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda handle, data: real(handle, data[:7]))
    write_atomically(file, "0123456789" * 50)
    assert file.read_text() == "0123456789" * 50


WRITER = """
import os, signal, sys
from loopserve.core.atomic_file import write_atomically

left, path = int(sys.argv[1]), sys.argv[2]
def dies(call):
    def counted(*arguments, **options):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*arguments, **options)
    return counted
real = os.write
os.write = lambda handle, data: real(handle, data[:400])
for name in ("write", "fsync", "replace", "open", "close", "chmod"):
    setattr(os, name, dies(getattr(os, name)))
write_atomically(path, "new\\n" * 300)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this platform")
def test_a_killed_process_leaves_the_old_text_or_the_new_one(file: Path) -> None:
    """Killed before each call of the system in its turn; the next writer removes what was left beside."""
    ended = []
    for left in range(1, 14):
        file.write_text(OLD)
        child = subprocess.run([sys.executable, "-c", WRITER, str(left), str(file)], check=False)
        ended.append(child.returncode)
        assert file.read_text() in (OLD, "new\n" * 300)
    assert ended[0] == -signal.SIGKILL and ended[-1] == 0
    write_atomically(file, "last\n")
    assert list(file.parent.iterdir()) == [file] and file.read_text() == "last\n"


def test_two_writers_do_not_interleave(file: Path) -> None:
    texts = [f"{name}\n" * 5000 for name in ("one", "two", "three")]
    order = [text for text in texts for _ in range(10)]
    random.Random(0).shuffle(order)
    threads = [threading.Thread(target=write_atomically, args=(file, text)) for text in order]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert file.read_text() in texts and list(file.parent.iterdir()) == [file]


def test_permissions_and_links_are_kept(tmp_path: Path, file: Path) -> None:
    file.chmod(0o640)
    link = tmp_path / "link.json"
    link.symlink_to(file)
    write_atomically(link, "new\n")
    assert link.is_symlink() and file.read_text() == "new\n"
    assert stat.S_IMODE(file.stat().st_mode) == 0o640


def test_what_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    for wrong in (tmp_path, tmp_path / "no" / "such", tmp_path / ("x" * 300)):
        with pytest.raises(OSError, match=r"Is a directory|No such file|name too long"):
            write_atomically(wrong, "text")
    assert list(tmp_path.iterdir()) == []


def test_a_device_is_written_to_directly() -> None:
    write_atomically(os.devnull, "text")
    assert stat.S_ISCHR(os.stat(os.devnull).st_mode)
