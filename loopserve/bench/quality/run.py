"""Hold a quality run, from a directory or from memory: its manifest and its records."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loopserve.bench.quality import manifest, records
from loopserve.bench.quality.records import Record
from loopserve.core.errors import ConfigError, did_you_mean


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
"""What the manifest of a run says of it."""


def open_run(directory: Path) -> Run:
    """Return a run from its directory, finished or not. Raises ConfigError if there is none."""
    found = manifest.read_manifest(directory)
    identity = found.get("identity")
    if not found.get("sessions") or not isinstance(identity, dict) or _NEEDED - identity.keys():
        raise ConfigError(f"{directory / manifest.FILE}: damaged (a part of what a run is is missing)")
    path = directory / records.FILE
    return Run(found["identity"], found["sessions"], records.read_records(path) if path.exists() else [])
