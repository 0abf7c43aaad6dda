"""Show the progress of long work: a bar at a terminal, one line a minute elsewhere."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

INTERVAL_S = 60.0

Report = Callable[[str, int, int], None]  # (label, done, total)


@contextmanager
def progress(*, lines: bool = False) -> Iterator[Report]:
    """Yield a function that reports work on stderr.

    lines: one bar per label; otherwise a single bar that shows the current label.
    """
    with _bars(lines) if sys.stderr.isatty() else _minutes() as report:
        yield report


@contextmanager
def _bars(lines: bool) -> Iterator[Report]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    left = () if lines else (TextColumn("left:"), TimeRemainingColumn())
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, *left, console=Console(stderr=True)) as bar:
        tasks: dict[str, Any] = {} if lines else {"": bar.add_task("loading", total=None)}

        def report(label: str, done: int, total: int) -> None:
            key = label if lines else ""
            if key not in tasks:
                tasks[key] = bar.add_task(label, total=total)
            bar.update(tasks[key], description=label, completed=done, total=total)

        yield report


@contextmanager
def _minutes(interval_s: float | None = None) -> Iterator[Report]:
    """Print a line a minute, also while one piece of the work takes longer than that."""
    state = ["loading"]
    over = threading.Event()
    started = time.monotonic()

    def write() -> None:
        while not over.wait(INTERVAL_S if interval_s is None else interval_s):
            print(f"{_elapsed(time.monotonic() - started)}: {state[0]}", file=sys.stderr, flush=True)

    def report(label: str, done: int, total: int) -> None:
        state[0] = f"{done} of {total}, {label}"

    writer = threading.Thread(target=write, name="progress", daemon=True)
    writer.start()
    try:
        yield report
    finally:
        over.set()
        writer.join()


def _elapsed(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min" if rest == 0 and minutes else f"{minutes} min {rest} s" if minutes else f"{rest} s"
