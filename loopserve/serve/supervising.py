"""Restart a server whose process crashed: a segmentation fault, or the system that needed its memory.

Knows neither torch nor the server: the process that waits stays small, and forks before any thread is there.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections import deque

_log = logging.getLogger("loopserve.serve")
_MOST_CRASHES, _WITHIN_S = 5, 60.0
_PASSED_ON = (signal.SIGTERM, signal.SIGINT)


def supervise() -> None:
    """Fork, and return in the child. The parent never returns: it forks again when a signal ended the child, else it exits as it did.

    SIGTERM and Ctrl-C are passed on to the child, which is not restarted then. Five crashes within a minute are the end. A child
    whose parent is gone exits at once. Does nothing where processes cannot be forked.
    """
    if not hasattr(os, "fork"):
        return
    crashes: deque[float] = deque(maxlen=_MOST_CRASHES)
    while True:
        watched, held = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(held)
            os.setpgid(0, 0)  # Ctrl-C at a terminal reaches the parent only, so that it is not counted twice
            threading.Thread(target=_exit_with_parent, args=(watched,), daemon=True).start()
            return
        os.close(watched)
        status, stopped = _wait(child)
        os.close(held)
        if not os.WIFSIGNALED(status) or stopped:
            sys.exit(os.waitstatus_to_exitcode(status) if os.WIFEXITED(status) else 128 + os.WTERMSIG(status))
        name = signal.Signals(os.WTERMSIG(status)).name
        crashes.append(time.monotonic())
        if len(crashes) == _MOST_CRASHES and crashes[-1] - crashes[0] < _WITHIN_S:
            print(
                f"error: the server crashed {_MOST_CRASHES} times within a minute, at last by {name}", file=sys.stderr
            )
            sys.exit(128 + os.WTERMSIG(status))
        print(f"warning: the server crashed ({name}) and is restarted", file=sys.stderr, flush=True)


def _wait(child: int) -> tuple[int, bool]:
    """Wait for the end of a child; return its status, and whether a signal asked for it."""
    asked: list[int] = []

    def pass_on(number: int, _: object) -> None:
        asked.append(number)
        os.kill(child, number)

    before = {each: signal.signal(each, pass_on) for each in _PASSED_ON}
    try:
        _, status = os.waitpid(child, 0)
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
    return status, bool(asked)


def _exit_with_parent(watched: int) -> None:
    os.read(watched, 1)  # returns when the parent's end is closed, which its death does as well
    os._exit(1)
