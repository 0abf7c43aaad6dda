"""Write and read the results of a run as JSON lines: one line per sample, stack and turn, appended sample by sample.

A line has ``stack``, ``family``, ``digest``, ``task``, ``sample``, ``turn`` and ``turns`` (the number of lines of the
sample under the stack), and either ``error`` (``kind``: broken, failed, slow or refused; ``why``) or the turn's
figures: see ``turn_record``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

from loopserve.bench.quality.conversation import Answered
from loopserve.bench.samples import AskedTurn
from loopserve.core.engine.stats import TurnStats
from loopserve.core.errors import ConfigError

Record = dict[str, Any]
Key = tuple[str, str, str, str]  # stack, digest, task, sample
Kind = Literal["broken", "failed", "slow", "refused"]
FILE = "records.jsonl"
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
