"""Find suite files by name in ``loopserve/bench/suites`` and in ``./benchmarks/suites``.

Two kinds share these folders: speed suites, and quality suites, which have ``tasks``.
"""

from __future__ import annotations

import re
from enum import StrEnum
from pathlib import Path

from loopserve.core.errors import ConfigError, did_you_mean
from loopserve.core.stack.config import Document, read_yaml

_SHIPPED = Path(__file__).parent / "suites"
_OWN = Path("benchmarks") / "suites"
_SUFFIXES = (".yaml", ".yml")
_TASKS = re.compile(r"^tasks:", re.MULTILINE)


class SuiteKind(StrEnum):
    SPEED = "speed"
    QUALITY = "quality"


_FIELDS = {
    SuiteKind.SPEED: {"prefill_kernels", "decode_kernels", "decode", "prefill", "short", "conversation"},
    SuiteKind.QUALITY: {"tasks"},
}
"""Fields that only suites of one kind have."""

_COMMAND = {SuiteKind.SPEED: "loopserve bench kernels, decode or prefill", SuiteKind.QUALITY: "loopserve bench run"}


def suite_files(kind: SuiteKind) -> dict[str, Path]:
    """Return the suites of a kind by name. Those of the current directory replace shipped ones."""
    folders = [_SHIPPED, Path.cwd() / _OWN]
    found = {
        file.stem: file
        for folder in folders
        if folder.is_dir()
        for file in sorted(folder.iterdir())
        if file.suffix in _SUFFIXES and file.is_file()
    }
    return {name: file for name, file in sorted(found.items()) if _kind(file) is kind}


def read_suite(spec: str, kind: SuiteKind) -> Document:
    """Return a suite by name or file. Raises ConfigError if there is none of this kind."""
    path = Path(spec)
    if path.suffix not in _SUFFIXES and not path.is_file():
        found = suite_files(kind)
        if spec not in found:
            raise ConfigError(f"unknown suite {spec!r}{did_you_mean(spec, found)}, or give a YAML file")
        path = found[spec]
    document = read_yaml(path, path.name)
    other = next(each for each in SuiteKind if each is not kind)
    if (
        isinstance(document.data, dict)
        and _FIELDS[other] & document.data.keys()
        and not _FIELDS[kind] & document.data.keys()
    ):
        raise ConfigError(f"{path.name}: this is a suite of {other}: give it to {_COMMAND[other]}")
    return document


def _kind(path: Path) -> SuiteKind:
    text = path.read_text(encoding="utf-8", errors="replace")
    return SuiteKind.QUALITY if _TASKS.search(text) else SuiteKind.SPEED
