"""Read and write rows of result files: one self-contained JSON object per line, so that files can be appended and joined.

Fields of every row: ``op``, ``shape`` (sizes by name), ``dtype``, ``data`` (source of the inputs), ``pattern``
(densities or None), ``impl``, ``parity`` (``ok`` or ``failed``) and those of ``provenance``. A row whose parity is
``ok`` has ``median_ms``, ``q20_ms``, ``q80_ms`` and ratios. A ratio is a speedup: above 1 the row is faster than the
baseline.
"""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loopserve.core.errors import ConfigError
from loopserve.core.machine import device_name

Row = dict[str, Any]
_IDENTITY = ("op", "shape", "dtype", "data", "impl", "stack", "device", "threads", "asked")


def provenance(device: str = "cpu") -> Row:
    """Return the conditions of a measurement: threads, device, versions, commit, date."""
    return {
        "threads": torch.get_num_threads(),
        "device": device_name(device),
        "versions": versions(),
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


@cache
def versions() -> dict[str, str]:
    """Return the versions that a figure depends on; ``cuda`` where torch was built with it."""
    found = {"python": platform.python_version()}
    for package in ("loopserve", "torch", "triton", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    if torch.version.cuda is not None:
        found["cuda"] = torch.version.cuda
    return found


@cache
def commit() -> str | None:
    """Return the commit of the package, with a ``+`` suffix if files were changed; None outside a checkout."""
    root = Path(__file__).parents[2]
    try:
        head = _git(root, "rev-parse", "--short=12", "HEAD").strip()
        changed = _git(root, "status", "--porcelain", "--untracked-files=no", "--", "loopserve").strip()
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+" if changed else "")


def _git(root: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True).stdout


def times(seconds: Sequence[float]) -> Row:
    """Return median and 20/80 quantiles of runs, in milliseconds."""
    low, middle, high = quantiles(seconds)
    return {"median_ms": middle * 1e3, "q20_ms": low * 1e3, "q80_ms": high * 1e3, "runs": len(seconds)}


def ratio(name: str, baseline: Sequence[float], ours: Sequence[float]) -> Row:
    """Return the speedup over the baseline, pair by pair: fields ``name``, ``name_q20``, ``name_q80``."""
    low, middle, high = quantiles([theirs / own for theirs, own in zip(baseline, ours, strict=True)])
    return {name: middle, f"{name}_q20": low, f"{name}_q80": high}


def quantiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the 20 %, 50 % and 80 % quantiles, interpolated."""
    found: Tensor = torch.tensor(list(values), dtype=torch.float64, device="cpu").quantile(
        torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64, device="cpu")
    )
    low, middle, high = found.tolist()
    return low, middle, high


_NEEDED = ("op", "device", "threads", "versions", "commit", "date")
"""Fields of every row of ``loopserve bench``."""


def append_rows(path: Path, rows: Iterable[Row]) -> None:
    """Append rows to a file of JSON lines, after the rows that it holds."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror})") from error


def read_rows(path: Path) -> list[Row]:
    """Return the rows of one file. Raises ConfigError, with the line, for an invalid row."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ConfigError(f"{path}:{number}: not a JSON row ({error})") from error
        if isinstance(row, dict) and "sample" in row and "stack" in row:
            raise ConfigError(f"{path}: these are answers of a quality run: give the run's directory")
        absent = [name for name in _NEEDED if not isinstance(row, dict) or name not in row]
        if absent:
            raise ConfigError(f"{path}:{number}: not a result row: it has no {absent[0]!r}")
        rows.append(row)
    return rows


def latest(rows: Iterable[Row]) -> list[Row]:
    """Return, of rows that measure the same on the same machine, the one appended last, in order of first appearance."""
    kept: dict[str, Row] = {}
    for row in rows:
        kept[json.dumps([row.get(field) for field in _IDENTITY], sort_keys=True)] = row
    return list(kept.values())
