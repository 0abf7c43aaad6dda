"""``loopserve policies check``: for names, for classes in one's own module, and for what is neither."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from loopserve.cli import main

Cli = Callable[..., tuple[int, str, str]]

MODULE = '''
from tests.testing.broken_selections import LastFirst
from tests.testing.honest import LargestKeys

class Mine(LargestKeys):
    """Keeps the largest keys [and says so in brackets]."""

made = LargestKeys(LargestKeys.Config(budget=20, recent_window=3))
number = 3
'''


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Cli:
    """Run `policies check` in a directory with a module of one's own: exit code, stdout, stderr."""
    monkeypatch.delenv("LOOPSERVE_TRACEBACK", raising=False)
    (tmp_path / "my_policies.py").write_text(MODULE, encoding="utf-8")
    (tmp_path / "my_broken_module.py").write_text("raise RuntimeError('not\\n  today')", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))  # what the command adds is taken away with it

    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main(["policies", "check", *arguments])
        out, err = capsys.readouterr()
        code = ended.value.code
        return (code if isinstance(code, int) else 0), out, err

    return run


def test_both_policies_of_a_name_are_checked(cli: Cli) -> None:
    code, out, _ = cli("loopserve")
    assert code == 0
    first, second = out.splitlines()
    assert first.startswith("prefill policy loopserve: ") and second.startswith("decode policy loopserve: ")
    assert ", 0 failed, " in first and ", 0 failed, " in second


def test_a_report_names_every_check_and_why_some_are_skipped(cli: Cli) -> None:
    code, out, _ = cli("full", "--report")
    assert code == 0 and "decode policy full" in out
    line = next(each for each in out.splitlines() if "budget_is_exact" in each)
    assert "The first output of a turn" in line and "skipped" in line and "no budget in tokens" in line
    assert next(each for each in out.splitlines() if "config_is_frozen" in each).rstrip().endswith(" ok")


def test_a_failure_is_reported_with_its_reason_and_ends_with_1(cli: Cli) -> None:
    code, out, err = cli("my_policies:LastFirst")
    assert code == 1 and err == ""
    assert out.startswith("selections_are_sorted failed: layer 0, turn 0: [")
    assert ", 1 failed, " in out.splitlines()[-1]
    code, out, _ = cli("my_policies:LastFirst", "--format", "json")
    (policy,) = json.loads(out)["policies"]
    assert code == 1 and (policy["kind"], policy["name"], policy["conforms"]) == ("decode", "last_first", False)
    (failed,) = (each for each in policy["checks"] if each["outcome"] == "failed")
    assert (
        failed["check"] == "selections_are_sorted" and failed["says"].startswith("The positions") and failed["reason"]
    )
    assert {each["outcome"] for each in policy["checks"]} == {"ok", "failed", "skipped"}


@pytest.mark.parametrize("target", ["my_policies:Mine", "my_policies:made"])
def test_a_class_or_an_object_of_ones_own_is_checked(cli: Cli, target: str) -> None:
    code, out, _ = cli(target, "--report")
    assert code == 0 and ", 0 failed, " in out.splitlines()[-1]


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("snapk", "unknown policy 'snapk'; did you mean 'snapkv'?"),
        ("my_polices:Mine", "my_polices:Mine: cannot import 'my_polices': ModuleNotFoundError: "),
        ("my_broken_module:Mine", "cannot import 'my_broken_module': RuntimeError: not today"),
        ("my_policies:Mne", "'my_policies' has no 'Mne'; did you mean 'Mine'? (known: Mine, made)"),
        ("my_policies:number", "3 is no policy: give a class or an object of one"),
    ],
)
def test_what_is_no_policy_is_one_clean_line(cli: Cli, target: str, message: str) -> None:
    code, out, err = cli(target)
    assert (code, out) == (2, "") and message in err and err.startswith("error: ") and err.count("\n") == 1
