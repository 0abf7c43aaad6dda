"""Hold a quality run, from a directory or from memory: its manifest and its records.

``manifest.json`` stores the identity of a run beside its records. A run is not resumed with other settings.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loopserve.bench.quality import records
from loopserve.bench.quality.records import Record
from loopserve.core.errors import ConfigError, did_you_mean

FILE = "manifest.json"
VERSION = 1


def claim(directory: Path, identity: Mapping[str, Any], session: Mapping[str, Any], *, resume: bool) -> None:
    """Reserve a directory for a run, or verify that it holds this run. Raises ConfigError that lists the differences.

    identity: the settings that every record depends on. session: machine, versions and date of this start; each start
    of the run adds one.
    """
    path = directory / FILE
    sessions = []
    if path.exists():
        if not resume:
            raise ConfigError(f"{directory}: holds a run already: go on with --resume, or choose another --output-dir")
        found = read_manifest(directory)
        if differences := list(_differences(found["identity"], _plain(identity))):
            raise ConfigError(
                "\n".join(f"{directory}: cannot be resumed, it is another run: {each}" for each in differences)
            )
        sessions = found["sessions"]
    elif directory.is_dir() and any(not each.name.startswith(".") for each in directory.iterdir()):
        raise ConfigError(f"{directory}: is not empty and holds no run: choose another --output-dir")
    _write(path, {"version": VERSION, "identity": identity, "sessions": [*sessions, session]})


def read_manifest(directory: Path) -> dict[str, Any]:
    """Return the manifest of a run. Raises ConfigError if the directory has none."""
    path = directory / FILE
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{directory}: no quality run ({FILE}: {error.strerror})") from error
    except ValueError as error:
        raise ConfigError(f"{path}: damaged ({error})") from error
    if not isinstance(found, dict) or found.get("version") != VERSION:
        raise ConfigError(f"{path}: not a manifest of version {VERSION}")
    return found


def _write(path: Path, manifest: Mapping[str, Any]) -> None:
    """Write the manifest atomically: a killed run leaves the old or the new one."""
    fresh = path.with_name(f".{path.name}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with fresh.open("w", encoding="utf-8") as file:
            json.dump(manifest, file, indent=2, ensure_ascii=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror})") from error


def _plain(value: Mapping[str, Any]) -> Any:
    """Return the value as JSON would return it: tuples are lists."""
    return json.loads(json.dumps(value))


def _differences(old: Any, new: Any, at: str = "") -> Iterator[str]:
    """Return ``model.digest was 'x' and is 'y'`` for each leaf that differs."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in {**old, **new}:
            yield from _differences(old.get(key), new.get(key), f"{at}.{key}" if at else key)
    elif old != new:
        yield f"{at} was {_shown(old)} and is {_shown(new)}"


def _shown(value: Any) -> str:
    text = "absent" if value is None else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 100 else text[:97] + "..."


@dataclass(frozen=True)
class Run:
    """Hold a run. identity: settings that the records depend on. sessions: machine, versions and date of each start, in order."""

    identity: Mapping[str, Any]
    sessions: list[Mapping[str, Any]]
    records: list[Record]

    @property
    def stacks(self) -> list[str]:
        """Return the names of the contestants, in the order they were asked."""
        return list(self.identity["lineup"])

    def of_stack(self, name: str) -> list[Record]:
        """Return the records of one contestant. Raises ConfigError if it did not take part."""
        if name not in self.stacks:
            raise ConfigError(f"the run has no stack {name!r}{did_you_mean(name, self.stacks)}")
        return [record for record in self.records if record["stack"] == name]


_NEEDED = {"suite", "model", "lineup", "stacks", "settings", "metrics"}
"""Required fields of a manifest's identity."""


def open_run(directory: Path) -> Run:
    """Return a run from its directory, finished or not. Raises ConfigError if there is none."""
    found = read_manifest(directory)
    identity = found.get("identity")
    if not found.get("sessions") or not isinstance(identity, dict) or _NEEDED - identity.keys():
        raise ConfigError(f"{directory / FILE}: damaged (a part of what a run is is missing)")
    path = directory / records.FILE
    return Run(found["identity"], found["sessions"], records.read_records(path) if path.exists() else [])
