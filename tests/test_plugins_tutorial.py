"""docs/plugins.md runs as it stands, from top to bottom; each hook has a heading, each method of a contract a mention."""

from __future__ import annotations

import inspect
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from loopserve.cli import main
from loopserve.core.policy import hookspecs
from loopserve.core.policy.interfaces import DecodeCompressor
from loopserve.plugins import load_registry
from tests.installed import install

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "plugins.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)


class Reader:
    """Does what the page says, in a folder of its own."""

    def __init__(self, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.home, self.monkeypatch = home, monkeypatch
        module = ModuleType("page_of_plugins")  # dataclasses look up the module of their class
        monkeypatch.setitem(sys.modules, module.__name__, module)
        self.names: dict[str, Any] = vars(module)
        self.ran: list[str] = []

    def bash(self, text: str) -> None:
        for line in text.splitlines():
            words = shlex.split(line)
            self.ran.append(" ".join(words[:3]))
            if words[0] == "loopserve":
                with pytest.raises(SystemExit) as ended:
                    main(words[1:])
                assert not ended.value.code, line
            elif words[:3] == ["pip", "install", "-e"]:
                install(Path.cwd(), self.home / "site", self.monkeypatch)
            elif words[:3] == ["python", "-m", "pytest"]:
                self._pytest(words[3:])
            else:
                assert words[0] == "cd" and len(words) == 2, f"nobody knows how to run {line!r}"
                self.monkeypatch.chdir(words[1])

    def _pytest(self, options: list[str]) -> None:
        ran = subprocess.run(
            [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", *options],
            env=os.environ | {"PYTHONPATH": os.pathsep.join([str(Path.cwd()), str(ROOT)])},
            capture_output=True,
            text=True,
            check=False,
        )
        assert ran.returncode == 0, ran.stdout + ran.stderr

    def diff(self, text: str) -> None:
        """``--- file``, then lines that go and lines that come."""
        first, *lines = text.splitlines()
        file = Path(first.removeprefix("--- "))
        gone, come = ("".join(f"{each[1:]}\n" for each in lines if each[0] == sign) for sign in "-+")
        source = file.read_text("utf-8")
        assert source.count(gone) == 1, f"{file} does not hold {gone!r} once"
        file.write_text(source.replace(gone, come), encoding="utf-8")

    def yaml(self, text: str) -> None:
        """``# file``, then what it holds."""
        Path(text.splitlines()[0].removeprefix("# ")).write_text(text, encoding="utf-8")

    def python(self, text: str) -> None:
        """As a module of its own, so that what looks at a class's source file finds none."""
        exec(text, self.names)


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Reader:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LOOPSERVE_DISABLED_PLUGINS", raising=False)
    return Reader(tmp_path, monkeypatch)


def test_the_page_runs_from_top_to_bottom(reader: Reader, capsys: pytest.CaptureFixture[str]) -> None:
    run = {"bash": reader.bash, "diff": reader.diff, "yaml": reader.yaml, "python": reader.python}
    for language, text in BLOCKS:
        if language != "text":  # what was printed, not what is to be run
            run[language](text)
    promised = {"policies new", "policies ls", "policies check", "stack validate", "run demo"}
    assert {f"loopserve {each}" for each in promised} <= set(reader.ran)
    owner = next(each.owner for each in load_registry(strict=True).registry if each.name == "long_pairs")
    assert str(owner) == "loopserve-long-pairs 0.1.0"
    printed = capsys.readouterr().out
    assert "loopserve-long-pairs 0.1.0" in printed and "decode policy long_pairs: " in printed


def test_every_hook_has_a_heading() -> None:
    hooks = [name for name in vars(hookspecs) if name.startswith("loopserve_")]
    headings = [line for line in PAGE.splitlines() if line.startswith("#")]
    assert hooks
    for hook in hooks:
        parameters = ", ".join(inspect.signature(getattr(hookspecs, hook)).parameters)
        assert f"### `{hook}({parameters})`" in headings


def test_every_method_of_a_compressor_is_explained() -> None:
    methods = {name for name, value in vars(DecodeCompressor).items() if inspect.isfunction(value) and name[0] != "_"}
    assert {"init_state", "after_forward"} <= methods
    for name in methods:
        assert f"| `{name}` |" in PAGE
