import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from loopserve import __version__
from loopserve.cli import main
from loopserve.core.errors import LoopServeError, ModelError

Cli = Callable[..., tuple[int, str, str]]
HEAVY = ("torch", "transformers", "ruamel.yaml", "pluggy")


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    """Run the command line in this process: exit code, stdout, stderr."""
    monkeypatch.delenv("LOOPSERVE_TRACEBACK", raising=False)
    monkeypatch.delenv("LOOPSERVE_STRICT_PLUGINS", raising=False)

    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        out, err = capsys.readouterr()
        code = ended.value.code
        return (code if isinstance(code, int) else 0), out, err

    return run


@pytest.mark.parametrize(
    "arguments", [["--help"], ["chat", "--help"], ["stack", "--help"], ["demo", "--help"], ["--version"]]
)
def test_help_loads_nothing_heavy(arguments: Sequence[str]):
    program = (
        "import sys\nfrom loopserve.cli import main\ntry:\n    main(sys.argv[1:])\nfinally:\n"
        f"    heavy = [name for name in {HEAVY} if name in sys.modules]\n"
        "    sys.exit(f'loaded {heavy}' if heavy else 0)"
    )
    ended = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert "loopserve" in ended.stdout


def test_a_stack_is_checked_against_a_model_whose_weights_are_not_read(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The bundled model has four layers; only its configuration may be read."""
    import transformers

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", None)
    policies = "prefill: {policy: dense}\ndecode: {policy: snapkv}\nlayers:\n- at: [1, %s]\n  decode: {policy: full}\n"
    beyond, within = tmp_path / "beyond.yaml", tmp_path / "within.yaml"
    beyond.write_text(policies % 99)
    within.write_text(policies % -1)
    code, out, err = cli("stack", "validate", str(within), str(beyond), "dense")
    assert (code, err) == (0, "") and out.count(": ok (") == 3
    assert "not checked without --model: whether the model has the layers 1, 99; whether" in out
    code, out, err = cli("stack", "validate", str(within), str(beyond), "--model", "demo")
    assert code == 2 and f"{within}: ok (" in out and "not checked" not in out
    assert "layers[0].at: 1, 99 does not fit the model, which has layers 0 to 3" in err
    results = json.loads(cli("stack", "validate", str(beyond), "--format", "json")[1])
    assert results[0]["not_checked"] == [
        "whether the model has the layers 1, 99", "whether the policies can serve its layers",
    ]  # fmt: skip
    assert json.loads(cli("stack", "validate", "dense", "--format", "json")[1])[0]["not_checked"] == []
    code, _, err = cli("stack", "validate", "dense", "--model", str(tmp_path))
    assert code == 1 and "cannot read the configuration of model" in err and "Traceback" not in err


def test_help_names_every_command(cli: Cli):
    code, out, _ = cli("--help")
    assert code == 0
    for command in ("demo", "chat", "run", "policies", "stack", "env", "bench"):
        assert f"\n  {command} " in out


def test_version(cli: Cli):
    assert cli("--version") == (0, f"loopserve {__version__}\n", "")


@pytest.mark.parametrize(
    "arguments",
    [
        ["frobnicate"],
        ["chat"],
        ["run", "demo", "hi", "--max-new-tokens", "0"],
        ["run", "demo", "hi", "--temperature", "-1"],
        ["demo", "--dialogues", "many"],
        ["policies", "ls", "--format", "xml"],
        ["stack", "validate"],
        ["--nonsense"],
    ],
)
def test_wrong_usage_ends_with_2_and_no_traceback(cli: Cli, arguments: Sequence[str]):
    code, _, err = cli(*arguments)
    assert code == 2 and "Traceback" not in err and "Usage" in err


# Policies


def test_policies_are_listed_with_who_brought_them(cli: Cli):
    code, out, _ = cli("policies", "ls")
    assert code == 0
    for name in ("dense", "a_shape", "full", "snapkv", "streaming_llm", "random"):
        assert name in out
    listed = json.loads(cli("policies", "ls", "--format", "json")[1])
    dense = next(each for each in listed["policies"] if each["name"] == "dense")
    assert dense["kind"] == "prefill" and dense["distribution"] == "loopserve"
    assert set(dense["capabilities"]) == {"layer_types", "retentions", "deterministic", "batched", "needs", "wraps"}
    kinds = [each["kind"] for each in listed["policies"]]
    assert kinds.count("prefill") >= 8 and kinds.count("decode") >= 16
    keys = {"kind", "name", "distribution", "version", "paper", "capabilities"}
    assert all(keys <= set(each) for each in listed["policies"])
    adakv = next(each for each in listed["policies"] if each["name"] == "adakv")
    assert adakv["capabilities"]["wraps"]


def test_the_matrix_names_every_pair_and_says_why_some_are_refused(cli: Cli):
    pairs = json.loads(cli("policies", "matrix", "--format", "json")[1])["pairs"]
    found = {(each["prefill"], each["decode"], each["retention"]): each for each in pairs}
    listed = json.loads(cli("policies", "ls", "--format", "json")[1])["policies"]
    prefill, decode = ([each["name"] for each in listed if each["kind"] == kind] for kind in ("prefill", "decode"))
    assert len(pairs) == len(found) == 2 * len(prefill) * len(decode)
    assert found["loopserve", "adakv", "evict"]["works"]
    refused = found["static_lines", "adakv", "evict"]
    assert not refused["works"] and "needs every pair of the conversation" in refused["reason"]
    assert found["dense", "quest", "evict"]["reason"] == "decode policy 'quest' cannot evict pairs"
    code, out, _ = cli("policies", "matrix")
    assert code == 0 and "refused: decode policy 'quest' cannot evict pairs" in out


def test_line_sizes_are_searched_on_a_model_and_read_by_the_policy(cli: Cli, tmp_path: Path):
    sizes, text = tmp_path / "sizes.json", tmp_path / "text.txt"
    code, out, _ = cli("policies", "search-minference", "demo", "--output", str(sizes), "--tokens", "300")
    assert code == 0 and "written to" in out
    stack = tmp_path / "stack.yaml"
    stack.write_text(f"prefill: {{policy: minference, sizes: {sizes}}}\ndecode: {{policy: full}}\n")
    assert cli("run", "demo", "hello", "--stack", str(stack), "--max-new-tokens", "2")[0] == 0
    layers = json.loads(sizes.read_text())["layers"]
    sizes.write_text(json.dumps({"layers": {"0": layers["0"]}}))
    code, _, err = cli("run", "demo", "hello", "--stack", str(stack))
    assert code == 2 and "at layers 1-3, prefill policy 'minference' has no sizes for it" in err
    sizes.write_text("{layers: {0: [[1, x]]}}")
    code, _, err = cli("run", "demo", "hello", "--stack", str(stack))
    assert code == 2 and "layers.0.0.1: " in err
    text.write_text("hello")
    code, _, err = cli("policies", "search-minference", "demo", "-o", str(sizes), "--text", str(text))
    assert code == 2 and "too few to search on" in err
    code, _, err = cli("policies", "search-minference", "no-such-model", "-o", str(tmp_path))
    assert code == 2 and "give a file in a directory that is there" in err


def test_heads_are_measured_on_a_model_and_read_by_both_phases(cli: Cli, tmp_path: Path):
    heads, text = tmp_path / "heads.json", tmp_path / "text.txt"
    small = ("--tokens", "300", "--sinks", "4", "--recent", "32")
    code, out, _ = cli("policies", "search-duo", "demo", "--output", str(heads), *small)
    assert code == 0 and "written to" in out
    stack = tmp_path / "stack.yaml"
    stack.write_text(f"prefill: {{policy: duo, heads: {heads}}}\ndecode: {{policy: duo, heads: {heads}}}\n")
    assert cli("run", "demo", "hello", "--stack", str(stack), "--max-new-tokens", "2")[0] == 0
    layers = json.loads(heads.read_text())["layers"]
    assert all(0 <= score <= 1 for scores in layers.values() for score in scores)
    heads.write_text(json.dumps({"layers": {"0": layers["0"]}}))
    code, _, err = cli("run", "demo", "hello", "--stack", str(stack))
    assert code == 2 and "at layers 1-3, prefill policy 'duo' has no scores for it" in err
    text.write_text("hello " * 50)
    code, _, err = cli("policies", "search-duo", "demo", "-o", str(heads), "--text", str(text))
    assert code == 2 and "at least 321 are needed" in err


def test_a_policy_shows_its_options(cli: Cli):
    code, out, _ = cli("policies", "show", "snapkv")
    assert code == 0
    assert "decode policy snapkv (from loopserve" in out and "https://arxiv.org/abs/2404.14469" in out
    budget = next(line for line in out.splitlines() if line.strip().startswith("budget"))
    assert "integer > 0" in budget and "1024" in budget
    assert "keep | evict" in out
    assert "no options" in cli("policies", "show", "dense")[1]
    (shown,) = json.loads(cli("policies", "show", "snapkv", "--format", "json")[1])
    assert shown["options"]["properties"]["budget"]["exclusiveMinimum"] == 0


def test_an_unknown_policy_is_one_clean_line(cli: Cli):
    code, out, err = cli("policies", "show", "snapk")
    assert (code, out) == (2, "")
    assert err.startswith("error: unknown policy 'snapk'; did you mean 'snapkv'? (known: ") and err.count("\n") == 1


# Stacks


def test_presets_are_listed_validated_and_shown(cli: Cli):
    names = [each["name"] for each in json.loads(cli("stack", "ls", "--format", "json")[1])]
    assert {"dense", "snapkv", "streaming_llm", "a_shape", "random", "snapkv-evict"} <= set(names)
    code, out, err = cli("stack", "validate", *names)
    assert (code, err) == (0, "") and out.count(": ok (") == len(names)
    table = cli("stack", "ls")[1]
    assert all(name in table for name in names)


def test_what_show_prints_is_a_stack_file_that_does_the_same(cli: Cli, tmp_path: Path):
    shown = cli("stack", "show", "snapkv")[1]
    file = tmp_path / "copy.yaml"
    file.write_text(shown)
    first = json.loads(cli("stack", "show", "snapkv", "--format", "json")[1])
    second = json.loads(cli("stack", "show", str(file), "--format", "json")[1])
    assert second.pop("source") == str(file) and first.pop("source") == "preset snapkv.yaml"
    assert first == second and first["digest"] in shown


def test_validate_prints_every_mistake_of_every_file(cli: Cli, tmp_path: Path):
    bad, good = tmp_path / "bad.yaml", tmp_path / "good.yaml"
    good.write_text("prefill: {policy: dense}\ndecode: {policy: full}\n")
    bad.write_text("prefill: {policy: a_shap}\ndecode:\n  policy: snapkv\n  budget: -3\n  budget: 3\n")
    code, out, err = cli("stack", "validate", str(bad), str(good), "snapk")
    assert code == 2 and out.startswith(f"{good}: ok (")
    lines = err.splitlines()
    assert lines[0].startswith(
        f"error: {bad}:1: prefill.policy: unknown prefill policy 'a_shap'; did you mean 'a_shape'?"
    )
    assert lines[1] == f"error: {bad}:4: decode.budget: Input should be greater than 0 (got -3)"
    assert lines[2] == f"error: {bad}:5: decode.budget: duplicate key, first given in line 4"
    assert lines[3].startswith("error: unknown stack 'snapk'; did you mean 'snapkv'?")
    results = json.loads(cli("stack", "validate", str(bad), str(good), "--format", "json")[1])
    assert [each["ok"] for each in results] == [False, True]
    assert results[0]["problems"][1] | {"text": ""} == {
        "line": 4,
        "field": "decode.budget",
        "message": "Input should be greater than 0 (got -3)",
        "text": "",
    }


def test_schema_is_json_with_every_policy(cli: Cli):
    code, out, _ = cli("stack", "schema")
    schema = json.loads(out)
    assert code == 0 and {"prefill_dense", "decode_snapkv"} <= set(schema["$defs"])


# Environment and plugins


def test_env_tells_versions_kernels_and_plugins(cli: Cli):
    found = json.loads(cli("env", "--format", "json")[1])
    assert found["loopserve"] == __version__ and found["packages"]["torch"]
    assert found["kernels"] and found["device"]["threads"] >= 1
    assert "prefill.dense" in found["plugins"]["loopserve"]
    code, out, _ = cli("env")
    assert code == 0 and "\npackages:\n  torch: " in out and "plugin_problems: " in out


def test_plugin_problems_are_warnings_unless_strict(cli: Cli, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LOOPSERVE_DISABLED_PLUGINS", "no_such_plugin")
    code, out, err = cli("policies", "ls", "--format", "json")
    assert code == 0 and err.startswith("warning: plugin 'no_such_plugin' skipped: ")
    assert json.loads(out)["problems"][0]["plugin"] == "no_such_plugin"
    code, _, err = cli("--strict-plugins", "policies", "ls")
    assert code == 1 and err.startswith("error: plugin 'no_such_plugin' skipped: ")
    monkeypatch.setenv("LOOPSERVE_STRICT_PLUGINS", "1")
    assert cli("policies", "ls")[0] == 1


# How errors end the program


class Engine:
    """Stands in for ``loopserve.api.Engine``; what loading raises is the test's."""

    error: BaseException

    @classmethod
    def from_pretrained(cls, *arguments: Any, **options: Any) -> "Engine":
        raise cls.error


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (
            ModelError("cannot load model 'x': no such directory"),
            1,
            "error: cannot load model 'x': no such directory\n",
        ),
        (LoopServeError("one\ntwo"), 1, "error: one\nerror: two\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
    ids=["model", "two-lines", "ctrl-c"],
)
def test_errors_end_with_one_clean_line_and_their_code(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, line: str
):
    monkeypatch.setattr(Engine, "error", error, raising=False)
    monkeypatch.setitem(sys.modules, "loopserve.api", SimpleNamespace(Engine=Engine))
    assert cli("run", "x", "hello", "--stack", "dense") == (code, "", line)


def test_a_traceback_can_be_asked_for(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LOOPSERVE_TRACEBACK", "1")
    with pytest.raises(LoopServeError):
        main(["stack", "show", "nope"])
