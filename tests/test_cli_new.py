"""``loopserve policies new``: what it writes works as it is, and what it will not write."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from loopserve.cli import main
from loopserve.cli.scaffold import Names
from loopserve.core.errors import ConfigError
from loopserve.testing import check_policy
from tests.installed import install

Cli = Callable[..., tuple[int, str, str]]
SHAPES = {
    "prefill": ["--kind", "prefill"],
    "decode": ["--kind", "decode"],
    "wrapper": ["--kind", "decode", "--wrapper"],
}


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    monkeypatch.delenv("LOOPSERVE_DISABLED_PLUGINS", raising=False)

    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        out, err = capsys.readouterr()
        code = ended.value.code
        return (code if isinstance(code, int) else 0), out, err

    return run


@pytest.fixture(params=SHAPES)
def written(
    request: pytest.FixtureRequest, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, Any]:
    """One distribution of each shape, installed; what the command said of it."""
    name = f"brand-new-{request.param}"
    code, out, err = cli(
        "policies", "new", name, *SHAPES[request.param], "--directory", str(tmp_path), "--format", "json"
    )
    assert (code, err) == (0, "")
    found: dict[str, Any] = json.loads(out)
    install(Path(found["directory"]), tmp_path / "site", monkeypatch)
    return found | {"shape": request.param}


def test_it_is_listed_with_its_distribution_and_works_in_yaml(
    cli: Cli, written: dict[str, Any], tmp_path: Path
) -> None:
    shape = written["shape"]
    assert written["policy"] == f"brand_new_{shape}" and written["distribution"] == f"loopserve-brand-new-{shape}"
    listed = json.loads(cli("--strict-plugins", "policies", "ls", "--format", "json")[1])["policies"]
    (found,) = [each for each in listed if each["name"] == written["policy"]]
    assert (found["kind"], found["distribution"], found["version"]) == (
        written["kind"],
        written["distribution"],
        "0.1.0",
    )
    assert found["capabilities"]["wraps"] is (shape == "wrapper")
    readme = (Path(written["directory"]) / "README.md").read_text("utf-8")
    stack = tmp_path / "stack.yaml"
    stack.write_text(readme.split("```yaml\n")[1].split("```")[0])
    assert cli("stack", "validate", str(stack))[0] == 0
    assert cli("run", "demo", "hello", "--stack", str(stack), "--max-new-tokens", "1")[0] == 0


def test_it_keeps_every_promise_of_the_kit(written: dict[str, Any]) -> None:
    class_name = Names(written["policy"]).class_name(written["kind"])
    policy = getattr(import_module(written["module"]), class_name)
    failed_or_not = [each.outcome for each in check_policy(policy)]
    assert len(failed_or_not) > 20


def test_its_files_are_tidy_and_few(written: dict[str, Any]) -> None:
    folder = Path(written["directory"])
    files = {
        str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and "__pycache__" not in str(path)
    }
    assert files == {"README.md", "pyproject.toml", f"{written['module']}.py", "tests/test_conformance.py"}
    assert {str(folder / each) for each in files} == set(written["files"])
    assert len((folder / f"{written['module']}.py").read_text("utf-8").splitlines()) <= 45
    for command in (["check", "--select", "E,F,W,UP,B,RUF"], ["format", "--check"]):
        ran = subprocess.run(
            [sys.executable, "-m", "ruff", *command, "--isolated", "--line-length", "120", str(folder)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert ran.returncode == 0, ran.stdout + ran.stderr


# What is refused


@pytest.mark.parametrize(
    ("word", "example"),
    [
        ("My-Policy", "my-policy"),
        ("myPolicy", "my-policy"),
        ("my--policy", "my-policy"),
        ("1st", "my-policy"),
        ("", "my-policy"),
    ],
)
def test_a_name_that_is_none_names_the_accepted_form(cli: Cli, tmp_path: Path, word: str, example: str) -> None:
    code, _, err = cli("policies", "new", word, "--kind", "decode", "--directory", str(tmp_path))
    assert code == 2 and err.startswith(f"error: {word!r} is no name for a policy: write lower-case words")
    assert f"such as {example!r} (in stack files it is then {example.replace('-', '_')!r})" in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "kind", "says"),
    [
        ("snapkv", "decode", "the name 'snapkv' is taken by the decode policy of loopserve "),
        ("a-shape", "prefill", "the name 'a_shape' is taken by the prefill policy of loopserve "),
        ("loopserve", "decode", "the name 'loopserve' is taken"),
    ],
)
def test_a_name_that_is_taken_is_refused(cli: Cli, tmp_path: Path, name: str, kind: str, says: str) -> None:
    code, _, err = cli("policies", "new", name, "--kind", kind, "--directory", str(tmp_path))
    assert code == 2 and says in err and "choose another" in err
    assert not list(tmp_path.iterdir())


def test_the_name_of_an_installed_plugin_is_taken(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its entry point, too, must be the only one of that name."""
    assert cli("policies", "new", "mine", "--kind", "decode", "--directory", str(tmp_path))[0] == 0
    install(tmp_path / "loopserve-mine", tmp_path / "site", monkeypatch)
    code, _, err = cli("policies", "new", "mine", "--kind", "prefill", "--directory", str(tmp_path / "other"))
    assert code == 2 and "the name 'mine' is taken by the plugin of loopserve-mine 0.1.0" in err


def test_what_is_there_already_stays_as_it_is(cli: Cli, tmp_path: Path) -> None:
    folder = tmp_path / "loopserve-mine"
    folder.mkdir()
    (folder / "precious.py").write_text("x = 1\n")
    code, _, err = cli("policies", "new", "mine", "--kind", "decode", "--directory", str(tmp_path))
    assert code == 2 and f"{folder} is there already and stays as it is" in err
    assert [each.name for each in folder.iterdir()] == ["precious.py"]


def test_a_place_that_cannot_be_written_is_one_clean_line(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    code, _, err = cli("policies", "new", "mine", "--kind", "decode", "--directory", str(tmp_path / "file"))
    assert code == 2 and "cannot be written: Not a directory" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--kind", "decoder"], "--kind decoder: a policy is prefill or decode"),
        (["--kind", "prefill", "--wrapper"], "--wrapper: only decode policies wrap others"),
        ([], "Missing option '--kind'"),
    ],
)
def test_a_kind_that_is_none_is_refused(cli: Cli, tmp_path: Path, options: list[str], says: str) -> None:
    code, _, err = cli("policies", "new", "mine", *options, "--directory", str(tmp_path))
    assert code == 2 and says in err


@pytest.mark.parametrize("word", ["my-policy", "my_policy", "my-policy_two", "x2"])
def test_one_word_has_three_faces(word: str) -> None:
    names = Names.of(word)
    assert names.policy == word.replace("-", "_") and names.distribution == "loopserve-" + word.replace("_", "-")
    assert names.module == f"loopserve_{names.policy}" and names.class_name("decode").isidentifier()
    with pytest.raises(ConfigError, match="is no name for a policy"):
        Names.of(word.capitalize())


def test_the_output_says_what_to_do_next(cli: Cli, tmp_path: Path) -> None:
    code, out, _ = cli("policies", "new", "mine", "--kind", "decode", "--directory", str(tmp_path))
    assert code == 0 and out.endswith("pip install -e '.[test]'\nloopserve policies check mine\n")
    assert str(tmp_path / "loopserve-mine" / "loopserve_mine.py") in out
