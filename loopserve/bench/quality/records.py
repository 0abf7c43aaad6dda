"""Write and read the results of a run as JSON lines: one line per sample, stack and turn, appended sample by sample.

A line has ``stack``, ``family``, ``digest``, ``task``, ``sample``, ``turn`` and ``turns`` (the number of lines of the
sample under the stack), and either ``error`` (``kind``: broken, failed, slow or refused; ``why``) or the turn's
figures: see ``turn_record``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

from loopserve.bench.quality.conversation import Answered
from loopserve.bench.samples import AskedTurn
from loopserve.core.engine.stats import TurnStats
from loopserve.core.errors import ConfigError, did_you_mean

Record = dict[str, Any]
Key = tuple[str, str, str, str]  # stack, digest, task, sample
Kind = Literal["broken", "failed", "slow", "refused"]
FILE = "records.jsonl"
MANIFEST = "manifest.json"
TIMES = ("ttft_ms", "tpot_ms")
_FIGURES = (
    "prompt_tokens",
    "reused_tokens",
    "output_tokens",
    *TIMES,
    "prefill_cell_density",
    "prefill_tile_density",
    "coverage_estimated",
    "coverage_held_out",
    "coverage_realised",
    "attended_pairs",
    "attended_fraction",
    "kv_bytes_per_token",
    "kv_bytes_per_token_with_observation",
    "dense_kv_bytes_per_token",
    "kv_bytes_by_kind",
    "reselected_steps",
    "compressed_share",
    "store_bytes",
    "active_bytes",
    "fallbacks",
    "counters",
)
VERSION = 1
_NEEDED = {"suite", "model", "lineup", "stacks", "settings", "metrics"}
"""Required fields of a manifest's identity."""


def key_of(record: Record) -> Key:
    return record["stack"], record["digest"], record["task"], record["sample"]


def error_record(stack: Record, task: str, sample: str, kind: Kind, why: str) -> Record:
    """Return the record of a broken sample, of one that failed under a stack, or of a stack that the model refused.

    stack: the fields ``stack``, ``family`` and ``digest``.
    """
    return {**stack, "task": task, "sample": sample, "turn": 0, "turns": 1, "error": {"kind": kind, "why": why}}


def is_asked_again(record: Record) -> bool:
    """Return whether a resumed run asks this sample again: a policy exceeded the time limit, possibly because of the machine."""
    return "error" in record and record["error"]["kind"] == "slow"


def turn_record(turn: AskedTurn, answered: Answered) -> Record:
    """Return the record of a turn: question, score, and figures of ``TurnStats``.

    ``attended_pairs`` is per step and layer, summed over KV heads; ``kv_bytes_per_token`` includes scoring and
    summaries.
    """
    stats = answered.stats.as_dict()
    return {
        "position": turn.position,
        "labels": dict(turn.labels),
        "metric": turn.metric,
        "gold": list(turn.answers),
        "answer": answered.text,
        "stopped": answered.stopped,
        **{name: stats[name] for name in _FIGURES},
        "cells_by_head": _cells_by_head(answered.stats),
    }


def _cells_by_head(stats: TurnStats) -> dict[str, list[float | None]]:
    """Return per layer the share of the causal cells that each head computed; empty for a dense prefill."""
    return {
        str(layer): [None if value is None else round(value, 3) for value in figures["prefill_cell_density"]]
        for layer, figures in stats.head_figures().items()
        if "prefill_cell_density" in figures
    }


class RecordFile:
    """Append to the file of a run, from one process at a time."""

    def __init__(self, path: Path) -> None:
        """Open the file and remove an incomplete sample at its end. Raises ConfigError if another process has it open."""
        self.path = path
        try:
            self._file = path.open("a+b")
        except OSError as error:
            raise ConfigError(f"{path}: cannot be written ({error.strerror})") from error
        try:
            _lock(self._file.fileno(), path)
            self.records, length = _read(path)
            self._file.truncate(length)
        except BaseException:
            self._file.close()
            raise

    def append(self, records: Sequence[Record]) -> None:
        """Append all lines of one sample under one stack, and flush them to disk."""
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        try:
            self._file.write(lines.encode())
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise ConfigError(f"{self.path}: cannot be written ({error.strerror})") from error
        again = {key_of(record) for record in records}
        self.records = [each for each in self.records if not (is_asked_again(each) and key_of(each) in again)]
        self.records += records

    def close(self) -> None:
        self._file.close()


def read_records(path: Path) -> list[Record]:
    """Return all complete samples of a file, which a run may still be writing.

    Raises ConfigError, with the line, for an invalid record.
    """
    try:
        return _read(path)[0]
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error


def turns(records: Iterable[Record]) -> Iterator[Record]:
    """Return the records of turns that were asked and scored."""
    return (record for record in records if "error" not in record and record["score"] is not None)


def _read(path: Path) -> tuple[list[Record], int]:
    """Return the complete samples of a file and their length in bytes. Only the last sample may be incomplete.

    Of a sample that was asked again, only the last try counts.
    """
    lines = path.read_bytes().splitlines(keepends=True)
    found: list[tuple[Record, int]] = []  # with the length of its line
    for number, line in enumerate(lines, 1):
        record = _parsed(line)
        if record is None:
            if number < len(lines):
                raise ConfigError(f"{path}:{number}: not a record of a quality run")
            break
        found.append((record, len(line)))
    kept: list[Record] = []
    length = number = 0
    for _, group in groupby(found, key=_sample_of):
        sample = list(group)
        number += len(sample)
        if [record["turn"] for record, _ in sample] != list(range(sample[0][0]["turns"])):
            if number < len(found) or len(sample) >= sample[0][0]["turns"]:
                raise ConfigError(f"{path}:{number}: turns are missing, doubled or out of order: was the file edited?")
            break
        kept += [record for record, _ in sample]
        length += sum(size for _, size in sample)
    last = {key_of(record): number for number, record in enumerate(kept)}
    superseded = (is_asked_again(each) and last[key_of(each)] > number for number, each in enumerate(kept))
    return [record for record, gone in zip(kept, superseded, strict=True) if not gone], length


def _sample_of(line: tuple[Record, int]) -> tuple[Key, int]:
    """Return the key of a line's sample. A sample that is asked again precedes its next try and is not part of it."""
    record = line[0]
    return key_of(record), id(record) if is_asked_again(record) else 0


def _parsed(line: bytes) -> Record | None:
    try:
        record = json.loads(line)
    except ValueError:  # UnicodeDecodeError is one
        return None
    complete = (
        line.endswith(b"\n")
        and isinstance(record, dict)
        and {"stack", "digest", "task", "sample"} <= record.keys()
        and all(isinstance(record.get(name), int) for name in ("turn", "turns"))
    )
    return record if complete else None


def _lock(descriptor: int, path: Path) -> None:
    """Lock the file for this process while it is open. The system releases the lock when the process ends."""
    try:
        import fcntl
    except ImportError:  # not a Unix
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise ConfigError(f"{path}: another run is writing to it") from error


def claim(directory: Path, identity: Mapping[str, Any], session: Mapping[str, Any], *, resume: bool) -> None:
    """Reserve a directory for a run, or verify that it holds this run. Raises ConfigError that lists the differences.

    identity: the settings that every record depends on. session: machine, versions and date of this start; each start
    of the run adds one.
    """
    path = directory / MANIFEST
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
    path = directory / MANIFEST
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{directory}: no quality run ({MANIFEST}: {error.strerror})") from error
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


def open_run(directory: Path) -> Run:
    """Return a run from its directory, finished or not. Raises ConfigError if there is none."""
    found = read_manifest(directory)
    identity = found.get("identity")
    if not found.get("sessions") or not isinstance(identity, dict) or _NEEDED - identity.keys():
        raise ConfigError(f"{directory / MANIFEST}: damaged (a part of what a run is is missing)")
    path = directory / FILE
    return Run(found["identity"], found["sessions"], read_records(path) if path.exists() else [])
