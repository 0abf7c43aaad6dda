"""Read rows of data sets: files and zips on disk, folders with several configs, and the hub through ``datasets``.

Files are JSON, JSONL or Parquet. An unreadable row carries the reason.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from importlib import import_module
from pathlib import Path
from typing import Any
from zipfile import BadZipFile
from zipfile import Path as ZipPath

from loopserve.core.errors import ConfigError, did_you_mean
from loopserve.core.stack.config import parse_yaml

SUFFIXES = (".jsonl", ".json", ".parquet")
DataFile = Path | ZipPath
DOWNLOAD = "hf download {repository} --repo-type dataset --local-dir {folder}"
_SPLIT = re.compile(r"[-_.](train|test|validation)\b.*$")


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


@dataclass(frozen=True)
class FolderRows:
    """Hold the rows of one config's files in memory, the configs beside it, and a digest of the data."""

    configs: tuple[str, ...]
    digest: str
    rows: Sequence[Row]

    def __len__(self) -> int:
        return len(self.rows)

    def row(self, number: int) -> Row:
        return self.rows[number]


@dataclass(frozen=True)
class HubRows:
    """Read a data set of ``datasets`` row by row from its Arrow files."""

    configs: tuple[str, ...]
    digest: str
    data: Any
    name: str

    def __len__(self) -> int:
        return len(self.data)

    def row(self, number: int) -> Row:
        return Row(f"{self.name}-{number}", self.data[number])


Rows = FolderRows | HubRows


def folder_rows(folder: Path, config: str, split: str, repository: str) -> FolderRows:
    """Return one config of a folder. Raises ConfigError, with the download command, if there is no such folder or config."""
    if not folder.is_dir():
        command = DOWNLOAD.format(repository=repository, folder=folder)
        raise ConfigError(f"{folder} is no folder; get the published set with: {command}")
    configs = folder_configs(folder, split)
    if not configs:
        command = DOWNLOAD.format(repository=repository, folder=folder)
        raise ConfigError(f"{folder} holds no JSON, JSONL or Parquet; get the published set with: {command}")
    if config not in configs:
        raise ConfigError(f"{folder}: no config {config!r}{did_you_mean(config, configs)}")
    files = configs[config]
    if not files:
        raise ConfigError(f"{folder}: config {config!r} has no file of the split {split!r}")
    return FolderRows(tuple(configs), digest(files), [row for file in files for row in read_rows(file)])


def folder_configs(folder: Path, split: str) -> dict[str, list[Path]]:
    """Return config names with their files of a split: from the README's front matter, else from folder and file names."""
    listed = _from_readme(folder, split)
    if listed:
        return listed
    found: dict[str, list[Path]] = {}
    for place in (folder, folder / "data"):
        if not place.is_dir():
            continue
        for file in data_files(place):
            found.setdefault(_SPLIT.sub("", file.stem), []).append(file)
        for inside in sorted(path for path in place.iterdir() if path.is_dir() and path != folder / "data"):
            if own := data_files(inside):
                found.setdefault(inside.name, []).extend(own)
    return {name: _of_split(files, split) for name, files in found.items()}


def hub_rows(repository: str, revision: str | None, config: str, split: str) -> HubRows:
    """Return one config from the hub. Raises ConfigError if ``datasets`` is missing or the set cannot be loaded."""
    try:
        datasets = import_module("datasets")
    except ImportError as error:
        raise ConfigError("the published set needs the package datasets: pip install 'loopserve[bench]'") from error
    try:
        configs = tuple(datasets.get_dataset_config_names(repository, revision=revision))
    except Exception as error:  # the hub's client raises different errors without a network or a data set
        command = DOWNLOAD.format(repository=repository, folder="published")
        raise ConfigError(
            f"{repository} cannot be had from the hub; get it with: {command}, then give source: published"
        ) from error
    if config not in configs:
        raise ConfigError(f"{repository}: no config {config!r}{did_you_mean(config, configs)}")
    try:
        data = datasets.load_dataset(repository, config, split=split, revision=revision)
    except Exception as error:
        raise ConfigError(f"{repository}: config {config!r}, split {split!r}: {_first_line(error)}") from error
    return HubRows(configs, _digest_of(data), data, config)


def _of_split(files: Sequence[Path], split: str) -> list[Path]:
    """Return the files whose names contain this split, and those that name none."""
    named = {file: match.group(1) if (match := _SPLIT.search("-" + file.stem)) else split for file in files}
    return [file for file, of in named.items() if of == split]


def _from_readme(folder: Path, split: str) -> dict[str, list[Path]]:
    """Return the ``configs`` of the front matter (the hub's convention); empty without it."""
    readme = folder / "README.md"
    match = re.match(r"---\n(.*?)\n---", readme.read_text(encoding="utf-8"), re.DOTALL) if readme.is_file() else None
    front = parse_yaml(match.group(1), str(readme)).data if match else None
    found: dict[str, list[Path]] = {}
    for entry in (front.get("configs") or []) if isinstance(front, Mapping) else []:
        files: list[Path] = []
        for listed in _as_list(entry.get("data_files")):
            of_split = listed.get("split", split) == split if isinstance(listed, Mapping) else True
            patterns = _as_list(listed.get("path") if isinstance(listed, Mapping) else listed)
            matched = sorted(
                {path for pattern in patterns for path in folder.glob(str(pattern)) if path.suffix in SUFFIXES}
            )
            files += (
                matched if isinstance(listed, Mapping) and of_split else _of_split(matched, split) if of_split else []
            )
        found[str(entry.get("config_name", "default"))] = files
    return found


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _digest_of(data: Any) -> str:
    """Return twelve hex digits over the number of rows and three of them; reading all would take minutes."""
    chosen = sorted({0, len(data) // 2, len(data) - 1}) if len(data) else []
    text = json.dumps([len(data), [data[number] for number in chosen]], sort_keys=True, default=str)
    return sha256(text.encode()).hexdigest()[:12]


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
