"""Puts a distribution where Python looks for them, as ``pip install -e`` does, for the length of a test."""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

import pytest


def install(folder: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of the distribution in ``folder``; its metadata are written to ``place``. Undone with the monkeypatch."""
    project = tomllib.loads((folder / "pyproject.toml").read_text("utf-8"))["project"]
    name, version = project["name"], project["version"]
    info = place / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    entries = project["entry-points"]["loopserve"]
    lines = [f"{plugin} = {module}\n" for plugin, module in entries.items()]
    (info / "entry_points.txt").write_text("".join(["[loopserve]\n", *lines]))
    for path in (place, folder):
        monkeypatch.syspath_prepend(str(path))
    for module in entries.values():
        monkeypatch.setitem(sys.modules, module, None)  # so that what is imported meanwhile is taken back at the end
        del sys.modules[module]
    return str(name)
