"""Print figures, tables, errors and progress, as text for people or as JSON for programs."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console


_PIPE_WIDTH = 200  # a pipe has no width of its own, and cells should not be cut there
Row = Sequence[str]
_GAP = 2  # columns between two cells
_EDGE = 2
_LEAST_PROSE = 16  # columns that make a text readable in a narrow column
_TURNED = 6  # a table of more rows is split instead of transposed
INTERVAL_S = 60.0
Report = Callable[[str, int, int], None]  # (label, done, total)


def console() -> Console:
    """Return the console of standard output, as wide as the terminal."""
    from rich.console import Console

    narrow = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Console(highlight=False, width=None if narrow else _PIPE_WIDTH)


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False, default=str))


_json_wanted = ContextVar("json_wanted", default=False)


def remember_json(wanted: bool) -> None:
    """Record whether this run prints JSON, so that errors are printed as JSON as well."""
    _json_wanted.set(wanted)


def print_error(text: str, kind: str) -> None:
    """Print an error on stderr, one line each, and as a JSON object on stdout if the command prints JSON."""
    for line in text.splitlines():
        print(f"error: {line}", file=sys.stderr)
    if _json_wanted.get():
        print_json({"error": text, "type": kind})


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"


def milliseconds(value: float | None) -> str:
    return "-" if value is None else f"{value:,.1f} ms"


def size(value: float | None) -> str:
    """Return bytes as text with a binary unit."""
    if value is None:
        return "-"
    for unit in ("B", "KiB", "MiB"):
        if abs(value) < 1024:
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} GiB"


def turn_line(stats: Mapping[str, Any]) -> str:
    """Return one turn's figures (``TurnStats.as_dict``) on one line."""
    return " · ".join(
        (
            f"turn {stats['turn'] + 1}: {stats['prompt_tokens']} new + {stats['reused_tokens']} reused tokens, "
            f"{stats['output_tokens']} out",
            f"TTFT {milliseconds(stats['ttft_ms'])}",
            f"TPOT {milliseconds(stats['tpot_ms'])}",
            f"prefill density {percent(stats['prefill_cell_density'])}",
            f"coverage {percent(stats['coverage_estimated'])}",
            f"attended {percent(stats['attended_fraction'])}",
            f"KV read {size(stats['kv_bytes_per_token'])}/token",
            f"held {size(stats['store_bytes'] + stats['active_bytes'])}",
            *([f"{stats['faults']:.0f} faults of policies"] if stats.get("faults") else []),
        )
    )


def unexpected(error: Exception) -> str:
    """Return one line about an exception that is not a ``LoopServeError``."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def print_table(
    columns: Sequence[str],
    rows: Sequence[Row],
    *,
    title: str | None = None,
    keys: int = 1,
    prose: Collection[str] = (),
    right: bool = False,
) -> None:
    """Print rows of text under their columns.

    keys: the first columns, which name a row. prose: columns whose text may be wrapped; every other cell stays on one line. right:
    align the columns after the keys to the right. If the table is too wide and has few rows, the columns become rows. Otherwise it
    is split into tables that repeat the keys. If a part would be too wide as well, each row becomes a list.
    """
    out = console()
    shown = _Layout(out, columns, [list(map(str, row)) for row in rows], title, keys, prose, right)
    shown.print()


class _Layout:
    def __init__(
        self,
        out: Console,
        columns: Sequence[str],
        rows: list[list[str]],
        title: str | None,
        keys: int,
        prose: Collection[str],
        right: bool,
    ) -> None:
        self.out, self.columns, self.rows, self.title = out, list(columns), rows, title
        self.keys, self.prose, self.right = keys, prose, right

    def print(self) -> None:
        every = range(len(self.columns))
        if self._width(every) <= self.out.width:
            self._print(self.columns, self.rows, self.title, [name in self.prose for name in self.columns])
        elif self._turned_fits():
            heading, *lines = zip(self.columns, *self.rows, strict=True)
            self._print(heading, lines, self.title, [False] * len(heading))
        elif bands := self._bands():
            for number, band in enumerate(bands):
                picked = [[row[each] for each in band] for row in self.rows]
                names = [self.columns[each] for each in band]
                self._print(names, picked, self.title if number == 0 else None, [name in self.prose for name in names])
        else:
            self._print_lists()

    def _cells(self, column: int) -> Iterator[str]:
        yield self.columns[column]
        yield from (row[column] for row in self.rows)

    def _least(self, column: int) -> int:
        """Return the terminal columns that a column needs."""
        widest = max(map(_length, self._cells(column)))
        return min(widest, _LEAST_PROSE) if self.columns[column] in self.prose else widest

    def _width(self, columns: Sequence[int]) -> int:
        return sum(map(self._least, columns)) + _GAP * (len(columns) - 1) + _EDGE

    def _turned_fits(self) -> bool:
        """Return whether a transposed table fits. Texts are not wrapped in it."""
        if self.prose or not 0 < len(self.rows) <= _TURNED:
            return False
        width = max(map(_length, self.columns)) + sum(max(map(_length, row)) + _GAP for row in self.rows) + _EDGE
        return width <= self.out.width

    def _bands(self) -> list[list[int]]:
        """Return the columns of each part of a split table, the keys in each; empty if a part would be too wide."""
        keys = list(range(self.keys))
        bands: list[list[int]] = []
        for column in range(self.keys, len(self.columns)):
            if bands and self._width([*bands[-1], column]) <= self.out.width:
                bands[-1].append(column)
            else:
                bands.append([*keys, column])
        return bands if all(self._width(band) <= self.out.width for band in bands) else []

    def _print(self, columns: Sequence[str], rows: Sequence[Row], title: str | None, prose: Sequence[bool]) -> None:
        from rich import box
        from rich.table import Table
        from rich.text import Text

        made = Table(
            title=title and Text(title), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0)
        )
        for number, name in enumerate(columns):
            widest = max(_length(name), *(_length(row[number]) for row in rows), 0)
            options: dict[str, Any] = {"overflow": "fold"} if prose[number] else {"no_wrap": True, "min_width": widest}
            made.add_column(Text(name), justify="right" if self.right and number >= self.keys else "left", **options)
        for row in rows:
            made.add_row(*map(Text, row))
        self.out.print(made)

    def _print_lists(self) -> None:
        """Print each row as lines ``column: cell``. Longer text continues on the next line, broken at a space if there is one."""
        from rich.padding import Padding
        from rich.text import Text

        if self.title:
            self.out.print(Text(self.title), style="italic")
        for row in self.rows:
            self.out.print(Text(" ".join(row[: self.keys])), style="bold", overflow="fold")
            for name, cell in zip(self.columns[self.keys :], row[self.keys :], strict=True):
                if cell:
                    self.out.print(Padding(Text(f"{name}: {cell}", overflow="fold"), (0, 0, 0, 2)))
        self.out.print()


def _length(text: str) -> int:
    from rich.cells import cell_len

    return max(map(cell_len, text.split("\n")))


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
