"""Progress of long work without a terminal: a line a minute, also in the midst of a long piece."""

from __future__ import annotations

import threading

import pytest

from loopserve.cli import output as module
from loopserve.cli.output import progress


class Written(list[str]):
    """A stream without a terminal that says when something was written."""

    def __init__(self) -> None:
        super().__init__()
        self.lines = threading.Semaphore(0)

    def write(self, text: str) -> int:
        self.append(text)
        if "\n" in text:
            self.lines.release()
        return len(text)

    def flush(self) -> None: ...

    def isatty(self) -> bool:
        return False


def test_a_line_a_minute_without_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    assert module.INTERVAL_S == 60.0
    monkeypatch.setattr(module, "INTERVAL_S", 0.001)
    written = Written()
    monkeypatch.setattr("sys.stderr", written)
    with progress() as report:
        written.lines.acquire()
        assert written[0].endswith(": loading")
        report("recall dense", 3, 12)
        while not any("3 of 12, recall dense" in line for line in written):
            written.lines.acquire()
    count = len(written)
    assert not [thread for thread in threading.enumerate() if thread.name == "progress"]
    assert len(written) == count, "nothing is written once the work is over"


def test_short_work_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    written = Written()
    monkeypatch.setattr("sys.stderr", written)
    with progress(lines=True) as report:
        report("dense", 1, 2)
    assert written == []


@pytest.mark.parametrize(("seconds", "text"), [(5.2, "5 s"), (60.1, "1 min"), (125, "2 min 5 s"), (3600, "60 min")])
def test_times_are_written_in_minutes(seconds: float, text: str) -> None:
    assert module._elapsed(seconds) == text
