"""Where finished units are kept: one file of JSON lines per experiment.

A run under way writes ``NAME.part.jsonl``; a line is a unit, so a killed run loses at most the units it was at. When the last
unit of the plan is in, the lines are sorted as planned and replace each ``NAME.jsonl``. So a page can always be made of the last
run that came to its end, and the next run begins anew.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from loopserve.core.errors import ConfigError
from research.evidence.units import Row, Unit, key_of


class Ledger:
    """The units of one plan and which of them are done."""

    def __init__(self, directory: Path, plan: Sequence[Unit], *, fresh: bool = False) -> None:
        """fresh: forget what a run that was broken off had done."""
        self.directory = directory
        self._planned: dict[str, list[str]] = {}
        for unit in plan:
            self._planned.setdefault(unit.experiment, []).append(unit.key)
        self._done: dict[str, set[str]] = {}
        try:
            directory.mkdir(parents=True, exist_ok=True)
            for experiment, keys in self._planned.items():
                part = self._part(experiment)
                if fresh:
                    part.unlink(missing_ok=True)
                kept = [row for row in read(part) if key_of(row["unit"]) in set(keys)]
                _write(part, kept)
                self._done[experiment] = {key_of(row["unit"]) for row in kept}
            self._finish_if_complete()
        except OSError as error:
            raise ConfigError(f"{directory}: results cannot be kept there ({error.strerror})") from error

    def waiting(self, plan: Iterable[Unit]) -> list[Unit]:
        """The units of the plan that are not done."""
        return [unit for unit in plan if unit.key not in self._done[unit.experiment]]

    def add(self, row: Row) -> None:
        """Keep a finished unit, on the disk before this returns."""
        experiment = row["experiment"]
        with self._part(experiment).open("a", encoding="utf-8") as file:
            file.write(written(row))
            file.flush()
            os.fsync(file.fileno())
        self._done[experiment].add(key_of(row["unit"]))
        self._finish_if_complete()

    def _part(self, experiment: str) -> Path:
        return self.directory / f"{experiment}.part.jsonl"

    def _finish_if_complete(self) -> None:
        if any(len(self._done[experiment]) < len(set(keys)) for experiment, keys in self._planned.items()):
            return
        for experiment, keys in self._planned.items():
            part = self._part(experiment)
            rows = {key_of(row["unit"]): row for row in read(part)}
            _write(part, [rows[key] for key in keys])
            part.replace(self.directory / f"{experiment}.jsonl")


def rows_of(directory: Path, experiment: str) -> list[Row]:
    """The rows of an experiment's last complete run; none if it never came to its end."""
    return read(directory / f"{experiment}.jsonl")


def read(path: Path) -> list[Row]:
    """The rows of a file, none if there is no file. A last line that was cut off is passed over; others are an error."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict) or not isinstance(row.get("unit"), dict):
                raise ValueError("it has no unit")
        except ValueError as error:
            if number == len(lines) and not line.endswith("\n"):
                break
            raise ConfigError(f"{path}:{number}: not a result row ({error}); --fresh begins anew") from error
        rows.append(row)
    return rows


def _write(path: Path, rows: Sequence[Row]) -> None:
    if not rows:
        path.unlink(missing_ok=True)
        return
    waiting = path.with_suffix(".new")
    waiting.write_text("".join(map(written, rows)), encoding="utf-8")
    waiting.replace(path)


def written(row: Row) -> str:
    """Return a row as the line that is kept of it."""
    return json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n"
