"""Suite files: what the shipped ones hold, and one clear line per mistake."""

from __future__ import annotations

from pathlib import Path

import pytest

import loopserve
from loopserve.bench.speed.suite import KernelPrefill, cases, load_suite
from loopserve.bench.suite_files import SuiteKind, suite_files
from loopserve.cli import main
from loopserve.core.errors import ConfigError

SUITES = Path(loopserve.__file__).parent / "bench" / "suites"


@pytest.mark.parametrize("name", suite_files(SuiteKind.SPEED))
def test_shipped_suites_load(name: str) -> None:
    assert load_suite(name).name == name == load_suite(str(SUITES / f"{name}.yaml")).name


def test_the_two_kinds_of_suites_are_distinguished() -> None:
    shipped = {path.stem for path in SUITES.glob("*.yaml")}
    speed, quality = (set(suite_files(kind)) for kind in SuiteKind)
    assert speed | quality == shipped and not speed & quality and "cpu" in speed and "synthetic-small" in quality
    with pytest.raises(ConfigError, match="this is a suite of quality: give it to loopserve bench run"):
        load_suite(str(SUITES / "synthetic-small.yaml"))


def test_a_suite_of_the_current_directory_is_found_by_name_and_wins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "benchmarks" / "suites"
    folder.mkdir(parents=True)
    for name in ("cpu.yaml", "v1.5.yml"):
        (folder / name).write_text("version: 1\nname: mine\n")
    monkeypatch.chdir(tmp_path)
    assert load_suite("cpu").name == load_suite("v1.5").name == "mine" and load_suite("gpu").name == "gpu"


def test_lists_multiply() -> None:
    part = KernelPrefill(tokens=(512, 1024), head_dim=(64, 128), new_tokens=256)
    assert [(each.tokens, each.head_dim, each.new_tokens) for each in cases(part, "tokens", "head_dim", "new_tokens")] == [
        (512, 64, 256), (512, 128, 256), (1024, 64, 256), (1024, 128, 256)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("prefill_kernels:\n  - {tokens: 5, heads: 2}\n", "mine.yaml:4: prefill_kernels[0].heads: unknown key"),
        ("prefil:\n  - {tokens: 5}\n", "mine.yaml:3: prefil: unknown key; did you mean 'prefill'?"),
        ("decode:\n  - {tokens: lots}\n", "mine.yaml:4: decode[0].tokens"),
        ("prefill_kernels:\n  - {tokens: 5, data: planted}\n", "density goes with data: planted"),
        ("prefill_kernels:\n  - {tokens: 5, new_tokens: 6}\n", "new_tokens cannot be more than tokens"),
        ("decode_kernels:\n  - {kv_heads: 2}\n", "decode_kernels[0].tokens: this key is required"),
        ("runs: 0\n", "mine.yaml:3: runs: Input should be greater than 0 (got 0)"),
        ("runs: [\n", "broken YAML"),
    ],
)
def test_a_mistake_is_one_clear_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, said: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("version: 1\nname: mine\n" + text)
    with pytest.raises(SystemExit) as ended:
        main(("bench", "kernels", "--suite", str(file)))
    err = capsys.readouterr().err
    assert ended.value.code == 2 and said in err and err.startswith("error: ") and "Traceback" not in err


def test_an_unknown_suite_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"unknown suite 'cqu'; did you mean 'cpu'\? \(known: cpu, gpu, smoke\)"):
        load_suite("cqu")
