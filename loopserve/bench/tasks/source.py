"""Read rows of a data set on disk: JSON, JSONL, Parquet, or JSONL inside a zip. An unreadable row carries the reason."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from importlib import import_module
from pathlib import Path
from typing import Any
from zipfile import BadZipFile
from zipfile import Path as ZipPath

from loopserve.core.errors import ConfigError

SUFFIXES = (".jsonl", ".json", ".parquet")
DataFile = Path | ZipPath


@dataclass(frozen=True)
class Row:
    """Hold one row of a file. ``id`` is the file's name and the row's number from 0; ``why`` is the reason for missing data."""

    id: str
    data: Mapping[str, Any] | None
    why: str = ""


def read_rows(file: DataFile) -> Iterator[Row]:
    """Yield the rows of one file, in order. Raises ConfigError if the file as a whole cannot be read."""
    stem, suffix = file.name.rsplit(".", 1)
    try:
        values = _parquet(file) if suffix == "parquet" else _json(file.read_text(encoding="utf-8"), suffix)
        for number, value in enumerate(values):
            yield _row(f"{stem}-{number}", value)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: cannot be read: {error}") from error


def gold_answers(value: Any) -> tuple[str, ...]:
    """Return a row's answers, a text or a list of them, without empty ones. Raises ValueError if there is none."""
    listed = [value] if isinstance(value, str) else value
    if not isinstance(listed, list) or not listed:
        raise ValueError("the list of answers is empty")
    if not all(isinstance(answer, str) for answer in listed):
        raise ValueError("an answer is no text")
    answers = tuple(answer for answer in listed if answer.strip())
    if not answers:
        raise ValueError("every answer is empty")
    return answers


def data_files(folder: Path) -> list[Path]:
    """Return the files of a folder that hold rows, by name, without those in subfolders."""
    return sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES)


def open_zip(path: Path) -> ZipPath:
    """Return the root inside a zip. Raises ConfigError if the file is not a zip."""
    try:
        return ZipPath(path)
    except (OSError, BadZipFile) as error:
        raise ConfigError(f"{path}: cannot be read as a zip: {error}") from error


def digest(files: Iterable[DataFile]) -> str:
    """Return twelve hex digits over the files' contents, to identify the data."""
    found = sha256()
    for file in files:
        found.update(file.read_bytes())
    return found.hexdigest()[:12]


def _row(name: str, value: Any) -> Row:
    if isinstance(value, _Broken):
        return Row(name, None, value.why)
    if not isinstance(value, Mapping):
        return Row(name, None, f"the row is no object but {type(value).__name__}")
    return Row(name, value)


@dataclass(frozen=True)
class _Broken:
    why: str


def _json(text: str, suffix: str) -> Iterator[Any]:
    """Yield the items of a list, or one row per line; both kinds are named .json."""
    if suffix == "json":
        try:
            whole = json.loads(text)
        except json.JSONDecodeError:
            whole = None
        if whole is not None:
            yield from whole if isinstance(whole, list) else [whole]
            return
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            yield json.loads(line)
        except json.JSONDecodeError as error:
            yield _Broken(f"line {number} is no JSON: {error.msg}")


def _parquet(file: DataFile) -> Iterator[Any]:
    try:
        parquet = import_module("pyarrow.parquet")
    except ImportError as error:
        raise ConfigError(f"{file}: Parquet needs pyarrow: pip install 'loopserve[bench]'") from error
    try:
        with file.open("rb") as opened:
            for batch in parquet.ParquetFile(opened).iter_batches(batch_size=64):
                yield from batch.to_pylist()
    except import_module("pyarrow").ArrowException as error:
        raise ConfigError(f"{file}: cannot be read as Parquet: {error}") from error
