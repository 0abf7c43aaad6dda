"""Where finished units are kept: one file of JSON lines per experiment, a line per unit, on the disk as soon as it is done.

A unit whose spec has changed since (another setting of a stack, say) is not in the plan any more; its row is dropped when a run
comes to its end. What the plan has and no row is there for is missing, and the page says so.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from loopserve.core.errors import ConfigError
from research.evidence.ledger import read, written
from research.evidence.units import Row, Unit, key_of


class Ledger:
    """The rows of a folder."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"{directory}: results cannot be kept there ({error.strerror})") from error

    def rows(self, experiment: str) -> list[Row]:
        """Return the rows of an experiment."""
        return read(self._file(experiment))

    def waiting(self, plan: Iterable[Unit]) -> list[Unit]:
        """Return the units of the plan that no row is there for."""
        units = list(plan)
        done = {key_of(row["unit"]) for name in {unit.experiment for unit in units} for row in self.rows(name)}
        return [unit for unit in units if unit.key not in done]

    def add(self, row: Row) -> None:
        """Keep a finished unit."""
        with self._file(row["experiment"]).open("a", encoding="utf-8") as file:
            file.write(written(row))
            file.flush()
            os.fsync(file.fileno())

    def tidy(self, plan: Sequence[Unit]) -> None:
        """Sort the rows of the plan's experiments as planned, and drop those that are not in it."""
        order = {unit.key: number for number, unit in enumerate(plan)}
        for name in dict.fromkeys(unit.experiment for unit in plan):
            kept = {key: row for row in self.rows(name) if (key := key_of(row["unit"])) in order}
            path = self._file(name)
            waiting = path.with_suffix(".new")
            waiting.write_text("".join(written(kept[key]) for key in sorted(kept, key=order.__getitem__)), "utf-8")
            waiting.replace(path)

    def _file(self, experiment: str) -> Path:
        return self.directory / f"{experiment}.jsonl"
