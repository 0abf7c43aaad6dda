"""Restart a server whose process crashed: a segmentation fault, or the system that needed its memory.

Knows neither torch nor the server. The process that waits has imported them, so that a restart has only the model to load; it forks
before any thread is there, and never computes anything.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress

_log = logging.getLogger("loopserve.serve")
BROKEN = 70  # exit status of a child that only a new process can take the place of
_MOST_CRASHES, _WITHIN_S = 5, 60.0
_MOST_UNREADY = 3  # crashes in a row of children that never took a request, however long each of them loads
_PASSED_ON = (signal.SIGTERM, signal.SIGINT)


def supervise(stopping: Callable[[], None] = lambda: None) -> Callable[[], None]:
    """Fork, and return in the child what it calls once it takes requests.

    The parent never returns: it forks again when a signal ended the child, or BROKEN says so. Else it exits as the child did.
    stopping: called in the parent when it is asked to end.

    SIGTERM and Ctrl-C are passed on to the child, which is not restarted then. Five crashes within a minute are the end, and three in
    a row of children that were never ready. A child whose parent is gone exits at once. Does nothing where processes cannot be
    forked.
    """
    if not hasattr(os, "fork"):
        return lambda: None
    unready = 0
    crashes: deque[float] = deque(maxlen=_MOST_CRASHES)
    signals = _Signals(stopping)
    while True:
        watched, held = os.pipe()
        ready_end, saying_end = os.pipe()
        child = os.fork()
        if child == 0:
            signals.restore()
            os.close(held)
            os.close(ready_end)
            os.setpgid(0, 0)  # Ctrl-C at a terminal reaches the parent only, so that it is not counted twice
            threading.Thread(target=_exit_with_parent, args=(watched,), daemon=True).start()
            return lambda: _say_ready(saying_end)
        os.close(watched)
        os.close(saying_end)
        signals.pass_on_to(child)
        _, status = os.waitpid(child, 0)
        os.close(held)
        unready = 0 if _was_ready(ready_end) else unready + 1
        code = os.waitstatus_to_exitcode(status)
        if signals.seen or code not in (BROKEN, *range(-64, 0)):
            sys.exit(code if code >= 0 else 128 - code)
        name = signal.Signals(-code).name if code < 0 else "its device failed"
        crashes.append(time.monotonic())
        often = len(crashes) == _MOST_CRASHES and crashes[-1] - crashes[0] < _WITHIN_S
        if often or unready == _MOST_UNREADY:
            times = (
                f"{_MOST_CRASHES} times within a minute" if often else f"{unready} times in a row before it was ready"
            )
            print(f"error: the server crashed {times}, at last ({name}); it is not started again", file=sys.stderr)
            sys.exit(code if code >= 0 else 128 - code)
        print(f"warning: the server crashed ({name}) and is restarted", file=sys.stderr, flush=True)


class _Signals:
    """Pass signals on to a child, also those that come before its number is known."""

    def __init__(self, stopping: Callable[[], None]) -> None:
        self._stopping = stopping
        self.seen: list[int] = []
        self._child: int | None = None
        self._before = {each: signal.signal(each, self._take) for each in _PASSED_ON}

    def pass_on_to(self, child: int) -> None:
        self._child = child
        for each in self.seen:
            self._send(each)

    def restore(self) -> None:
        """Handle signals as before. Call it in the child."""
        for each, handler in self._before.items():
            signal.signal(each, handler)

    def _take(self, number: int, _: object) -> None:
        self.seen.append(number)
        self._stopping()
        self._send(number)

    def _send(self, number: int) -> None:
        if self._child is not None:
            with suppress(ProcessLookupError):
                os.kill(self._child, number)


def _say_ready(saying_end: int) -> None:
    with suppress(OSError):  # the parent is gone
        os.write(saying_end, b"r")


def _was_ready(ready_end: int) -> bool:
    """Return whether a child that has ended was ready before. Processes that it left behind are not waited for."""
    os.set_blocking(ready_end, False)
    try:
        return bool(os.read(ready_end, 1))
    except BlockingIOError:
        return False
    finally:
        os.close(ready_end)


def _exit_with_parent(watched: int) -> None:
    os.read(watched, 1)  # returns when the parent's end is closed, which its death does as well
    os._exit(1)
