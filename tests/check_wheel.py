"""``make check-wheel``: builds source distribution and wheel as an index gets them, and tries the wheel as its user does.

``python -m tests.check_wheel PYTHON``: run by an interpreter that has build, twine and the build backend. PYTHON is one that has what
loopserve depends on; the fresh environment borrows those packages, so nothing is downloaded.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
HELD = (
    "loopserve/py.typed",
    "loopserve/bench/suites/synthetic-small.yaml",
    "loopserve/bench/suites/cpu.yaml",
    "loopserve/bench/data/longbench/qmsum.jsonl",
    "loopserve/stacks/loopserve.yaml",
    "loopserve/templates/decode.py.txt",
    "loopserve/kernels/native/src/dispatch.c",
    "loopserve/models/weights/recall/model.safetensors",
    "loopserve/serve/static/page.html",
    "loopserve/serve/static/page.js",
)
"""A file of each kind that is no Python."""

COMMANDS = (
    ("policies ls", "streaming_llm"),
    ("stack validate loopserve snapkv", "loopserve: ok"),
    ("bench ls --format json", '"quality-smoke"'),
    ("bench run --suite quality-smoke --stack dense --limit 1 --output-dir run", "Answers"),
    ("kernels build", "native-"),
    ("env", "compiler: "),
)
"""What is run from the wheel, and what it must say."""


def main(python: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _run(sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder / "dist"), str(ROOT), cwd=ROOT)
        (wheel,), (source,) = (folder / "dist").glob("*.whl"), (folder / "dist").glob("*.tar.gz")
        _run(sys.executable, "-m", "twine", "check", "--strict", str(wheel), str(source), cwd=ROOT)
        _check_contents(wheel)
        print(
            f"{wheel.name}: {wheel.stat().st_size / 2**20:.1f} MiB, {source.name}: {source.stat().st_size / 2**20:.1f} MiB"
        )
        fresh = _environment(folder, python, wheel)
        for command, said in COMMANDS:
            out = _run(
                str(fresh / "bin" / "loopserve"), *command.split(), cwd=folder, LOOPSERVE_CACHE=str(folder / "cache")
            )
            assert said in out, f"loopserve {command}: {said!r} is not in what it says:\n{out}"
            print(f"loopserve {command}: ok")


def _check_contents(wheel: Path) -> None:
    assert wheel.name.endswith("-py3-none-any.whl"), f"{wheel.name}: an index refuses wheels of this platform's tag"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (metadata,) = (archive.read(each).decode() for each in names if each.endswith(".dist-info/METADATA"))
    assert not (lacking := set(HELD) - names), f"not in the wheel: {sorted(lacking)}"
    assert not (foreign := {each for each in names if not each.startswith("loopserve")}), (
        f"in the wheel: {sorted(foreign)}"
    )
    links = re.findall(r"\]\((?![a-z]+:|#)[^)]*\)", metadata)
    assert not links, f"links that lead nowhere on an index: {links}"
    for field in ("Project-URL", "Classifier", "Keywords", "License-Expression"):
        assert f"\n{field}: " in metadata, f"no {field} in the metadata"


def _environment(folder: Path, python: str, wheel: Path) -> Path:
    """A fresh environment with the wheel, and beside it what the other interpreter has; without any loopserve of that one."""
    fresh, borrowed = folder / "venv", folder / "packages"
    venv.create(fresh, with_pip=True, symlinks=True)
    borrowed.mkdir()
    site = Path(_run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=ROOT).strip())
    for each in site.iterdir():
        if "loopserve" not in each.name.lower() and each.suffix != ".pth":
            (borrowed / each.name).symlink_to(each)
    interpreter = str(fresh / "bin" / "python")
    _run(interpreter, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", str(wheel), cwd=folder)
    place = _run(interpreter, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip()
    (Path(place) / "borrowed.pth").write_text(f"{borrowed}\n", encoding="utf-8")
    found = _run(interpreter, "-c", "import loopserve; print(loopserve.__file__)", cwd=folder).strip()
    assert Path(found).is_relative_to(fresh), f"loopserve is imported from {found}, not from the wheel"
    return fresh


def _run(*command: str, cwd: Path, **environment: str) -> str:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "LOOPSERVE"))}
    done = subprocess.run(
        command, cwd=cwd, env=clean | environment, capture_output=True, text=True, check=False, encoding="utf-8"
    )
    assert done.returncode == 0, f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}"
    return done.stdout


if __name__ == "__main__":
    main(sys.argv[1])
