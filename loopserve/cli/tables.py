"""Print tables that fit the terminal. No figure is ever cut: a table that is too wide is transposed, split, or printed as lists."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from loopserve.cli.output import console

if TYPE_CHECKING:
    from rich.console import Console

Row = Sequence[str]

_GAP = 2  # columns between two cells
_EDGE = 2
_LEAST_PROSE = 16  # columns that make a text readable in a narrow column
_TURNED = 6  # a table of more rows is split instead of transposed


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
