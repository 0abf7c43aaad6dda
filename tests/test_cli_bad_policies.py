"""What people get wrong about policies, as they meet it: one clear error, at load."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from loopserve.cli import main
from tests.installed import install

Cli = Callable[..., tuple[int, str, str]]
SOURCE = '''
from loopserve import Capabilities, DecodeCompressor, LayerType, hookimpl

class Policy(DecodeCompressor):
    """Does nothing at all."""

    name = "{name}"
    paper = ""
    capabilities = Capabilities({capabilities})

    def init_state(self):
        return None

@hookimpl
def loopserve_register_policies(registry):
    registry.register(Policy)
'''


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


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Install a distribution ``loopserve-bad`` with this source."""

    def make(source: str) -> None:
        folder = tmp_path / "plugin"
        folder.mkdir()
        (folder / "loopserve_bad.py").write_text(source)
        (folder / "pyproject.toml").write_text(
            '[project]\nname = "loopserve-bad"\nversion = "0.3"\n[project.entry-points.loopserve]\nbad = "loopserve_bad"\n'
        )
        install(folder, tmp_path / "site", monkeypatch)

    return make


DATED = SOURCE.format(name="dated", capabilities="")
WRONG = {
    "snapkv": "decode policy 'snapkv' of loopserve-bad 0.3 (loopserve_bad.Policy) has a name that loopserve ",
    "my-policy": "name must be lower-case words joined by '_', got 'my-policy'; write 'my_policy'",
    "MyPolicy": "name must be lower-case words joined by '_', got 'MyPolicy'; write 'my_policy'",
}


DATED = SOURCE.format(name="dated", capabilities="")
WRONG = {
    "snapkv": "decode policy 'snapkv' of loopserve-bad 0.3 (loopserve_bad.Policy) has a name that loopserve ",
    "my-policy": "name must be lower-case words joined by '_', got 'my-policy'; write 'my_policy'",
    "MyPolicy": "name must be lower-case words joined by '_', got 'MyPolicy'; write 'my_policy'",
}


DATED = SOURCE.format(name="dated", capabilities="")
WRONG = {
    "snapkv": "decode policy 'snapkv' of loopserve-bad 0.3 (loopserve_bad.Policy) has a name that loopserve ",
    "my-policy": "name must be lower-case words joined by '_', got 'my-policy'; write 'my_policy'",
    "MyPolicy": "name must be lower-case words joined by '_', got 'MyPolicy'; write 'my_policy'",
}


@pytest.mark.parametrize(
    ("source", "says"),
    [
        *((SOURCE.format(name=name, capabilities=""), says) for name, says in WRONG.items()),
        (
            f"LOOPSERVE_API = (2, 0)\n{DATED}",
            "it is written for version 2.0 of loopserve's plugin API, this loopserve has ",
        ),
        (
            DATED.replace("paper =", "api_version = (0, 3)\n    paper ="),
            "loopserve_bad.Policy is written for version 0.3",
        ),
    ],
    ids=["taken", "hyphen", "capital", "plugin-of-another-api", "policy-of-another-api"],
)
def test_a_plugin_that_is_wrong_is_named_and_the_others_load(
    cli: Cli, plugin: Callable[[str], None], source: str, says: str
) -> None:
    plugin(source)
    code, out, err = cli("policies", "ls")
    assert code == 0 and "snapkv" in out and "loopserve-bad" not in out
    (line,) = [each for each in err.splitlines() if "loopserve-bad" in each]
    assert line.startswith("warning: plugin 'bad' (loopserve-bad 0.3) skipped: ") and says in line
    code, _, err = cli("--strict-plugins", "policies", "ls")
    assert code == 1 and says in err and "Traceback" not in err


@pytest.mark.parametrize(
    ("decode", "says"),
    [
        (
            "{policy: adakv}",
            "decode.inner: this policy wraps another one, which is missing: name it, such as {policy: ",
        ),
        (
            "&a {policy: adakv, inner: *a}",
            "decode.inner: refers to itself: an alias may not stand inside what it names",
        ),
        ("{policy: adakv, inner: " * 6 + "{policy: snapkv}" + "}" * 6, "policies are nested deeper than 4 levels"),
        ("{policy: my-policy}", "decode.policy: unknown decode policy 'my-policy'"),
    ],
    ids=["no-inner", "recursion", "too-deep", "hyphen"],
)
def test_a_stack_that_is_wrong_is_refused_with_its_line(cli: Cli, tmp_path: Path, decode: str, says: str) -> None:
    stack = tmp_path / "mine.yaml"
    stack.write_text(f"version: 1\nprefill: {{policy: dense}}\ndecode: {decode}\n")
    for command in (["stack", "validate", str(stack)], ["run", "demo", "hello", "--stack", str(stack)]):
        code, _, err = cli(*command)
        assert code == 2 and "Traceback" not in err
        assert err.startswith(f"error: {stack}:3: ") and says in err


def test_a_policy_on_a_layer_type_it_does_not_declare_is_refused_when_the_model_is_loaded(
    cli: Cli, plugin: Callable[[str], None], tmp_path: Path
) -> None:
    plugin(SOURCE.format(name="sliding_only", capabilities="layer_types=frozenset({LayerType.SLIDING})"))
    stack = tmp_path / "mine.yaml"
    stack.write_text("version: 1\nname: mine\nprefill: {policy: dense}\ndecode: {policy: sliding_only}\n")
    code, _, err = cli("run", "demo", "hello", "--stack", str(stack))
    assert code == 2 and err == (
        "error: stack 'mine': decode policy 'sliding_only' at layers 0-3 serves only sliding_attention layers: "
        "choose another policy there\n"
    )
