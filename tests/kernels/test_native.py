"""The compiled kernels: half precision, every instruction set, and what happens where nothing can be compiled."""

from __future__ import annotations

import json
import math
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loopserve.kernels import backend
from loopserve.kernels.decode_attention import decode_attention
from loopserve.kernels.dense_attention import dense_attention
from loopserve.kernels.line_scores import line_scores
from loopserve.kernels.native import build, library
from loopserve.kernels.token_scores import token_scores
from loopserve.kernels.vertical_slash import vertical_slash
from tests.kernels.cases import make

ROOT = Path(__file__).parents[2]
needs_library = pytest.mark.usefixtures("compiled")


@pytest.fixture
def compiled() -> None:
    assert library.unavailable() is None, "the tests' machine has a C compiler"


@needs_library
@given(
    total=st.sampled_from([1, 63, 111, 400]),
    share=st.floats(0.01, 1.0),
    dim=st.sampled_from([32, 64, 96, 128]),
    group=st.sampled_from([1, 4, 7]),
    filler=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=60)
def test_half_precision_is_as_good_as_half_precision_can_be(
    total: int, share: float, dim: int, group: int, filler: bool, seed: int
) -> None:
    rows = max(1, int(share * total))
    case = make(rows, total, group=group, dim=dim, seed=seed, filler=filler)
    half = [part.bfloat16() for part in (case.queries, case.keys, case.values)]
    lines = case.bools(2 * group, total, share=0.1), case.bools(2 * group, total, share=0.05)
    options = {"scaling": dim**-0.5, "first_valid": case.first_valid}
    for function, extra, more in [
        (vertical_slash, lines, {}),
        (dense_attention, (), {"need_lse": True}),
        (decode_attention, (), {"need_lse": True}),
    ]:
        with backend.use("reference"):
            wanted, wanted_lse = function(*[part.float() for part in half], *extra, **options, **more)
        with backend.use("cpu"):
            found, lse = function(*half, *extra, **options, **more)
        assert found.dtype is torch.bfloat16
        torch.testing.assert_close(found.float(), wanted, atol=0.03, rtol=0.03)
        torch.testing.assert_close(lse, wanted_lse, atol=1e-2, rtol=1e-2)
    columns = torch.arange(total - rows, total)
    for function in (line_scores, token_scores):
        with backend.use("reference"):
            wanted = function(half[0].float(), half[1].float(), columns, **options)
        with backend.use("cpu"):
            found = function(half[0], half[1], columns, **options)
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-3)


@needs_library
@pytest.mark.parametrize("level", [level.name for level in build.levels()[1:]])
def test_lower_instruction_sets_give_the_same(level: str, tmp_path: Path) -> None:
    """A processor without the best instructions compiles other code: the same tests, in a process of its own."""
    every = [each.name for each in build.levels()]
    if every.index(level) < every.index(library.level()):
        return  # this processor is older still
    tests = [
        "test_attention_ops.py",
        "test_odd_numbers.py::test_numbers_that_are_none_are_not_hidden",
        "test_scores.py",
        "test_key_codes.py",
        "test_top_columns.py",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", *(f"tests/kernels/{name}" for name in tests)],
        env={**os.environ, "LOOPSERVE_CPU_LEVEL": level, "LOOPSERVE_CACHE": str(tmp_path)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:]
    assert list(tmp_path.glob("native-*.so"))


def _in_a_fresh_process(code: str, **environment: str) -> str:
    given = {name: value for name, value in os.environ.items() if name != "LOOPSERVE_KERNELS"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=given | environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


SAYS = (
    "import torch; from loopserve.kernels import backend; from loopserve.kernels.vertical_slash import vertical_slash\n"
    "row = {r['operation']: r for r in backend.describe()}['vertical_slash']; print(row['implementation'], row['why'])\n"
    "lines = torch.ones(1, 4, dtype=torch.bool); x = torch.randn(1, 4, 32)\n"
    "print(vertical_slash(x, x, x, lines, lines, scaling=1.0)[0].shape)\n"
)


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [("no-such-compiler", "CC=no-such-compiler is not found"), ("false", "false failed: no message")],
)
def test_without_a_compiler_plain_pytorch_serves_and_says_why_once(compiler: str, reason: str, tmp_path: Path) -> None:
    said = _in_a_fresh_process(SAYS, CC=compiler, LOOPSERVE_CACHE=str(tmp_path))
    assert said.startswith("torch ") and "no cpu: " in said and reason in said
    assert "torch.Size([1, 4, 32])" in said
    assert said.count("compiled kernels are not available") == 1


WHERE = (
    "from loopserve.kernels.native import library\n"
    "print(library.unavailable() or ' '.join(sorted(library.describe().values())))\n"
)


@needs_library
@pytest.mark.parametrize("compiler", ["no-such-compiler", "false"])
def test_a_library_of_the_cache_serves_where_the_compiler_is_gone(compiler: str, tmp_path: Path) -> None:
    """The second stage of a container image has the cache of the first, and no compiler."""
    _in_a_fresh_process(SAYS, LOOPSERVE_CACHE=str(tmp_path))
    (made,) = tmp_path.glob("native-*.so")
    said = _in_a_fresh_process(SAYS + WHERE, CC=compiler, LOOPSERVE_CACHE=str(tmp_path))
    assert said.startswith("cpu ") and str(made) in said and "not available" not in said
    record = json.loads(made.with_suffix(".json").read_text())
    assert record["sources"] == build.source_digest() and record["compiler"] in said


@needs_library
@pytest.mark.parametrize(
    ("change", "environment", "why"),
    [
        ({"sources": "0123456789abcdef"}, {}, None),
        ({"flags": ["-fsanitize=address"]}, {}, None),
        ({}, {"LOOPSERVE_CPU_LEVEL": "avx1024"}, "it has no instruction set"),
        ({}, {"LOOPSERVE_CFLAGS": "-g"}, None),
        (None, {}, None),  # no record
    ],
)
def test_a_library_built_otherwise_is_not_taken_for_it(
    change: dict[str, object] | None, environment: dict[str, str], why: str | None, tmp_path: Path
) -> None:
    made = _shared_library(tmp_path)
    record = made.with_suffix(".json")
    if change is None:
        record.unlink()
    else:
        record.write_text(json.dumps(json.loads(record.read_text()) | change))
    said = _in_a_fresh_process(WHERE, CC="no-such-compiler", LOOPSERVE_CACHE=str(tmp_path), **environment)
    assert "CC=no-such-compiler is not found" in said
    assert (f"{made} cannot be used: {why}" in said) if why else (str(made) not in said)


@needs_library
def test_the_best_library_for_the_processor_is_taken_and_damaged_ones_are_named(tmp_path: Path) -> None:
    made = _shared_library(tmp_path)
    broken = tmp_path / "native-0000000000000000.so"
    broken.write_bytes(b"not a library")
    broken.with_suffix(".json").write_text(made.with_suffix(".json").read_text())
    assert str(made) in _in_a_fresh_process(WHERE, CC="no-such-compiler", LOOPSERVE_CACHE=str(tmp_path))
    made.unlink()
    said = _in_a_fresh_process(WHERE, CC="no-such-compiler", LOOPSERVE_CACHE=str(tmp_path))
    assert f"{broken} cannot be used: " in said and "CC=no-such-compiler is not found" in said


def _shared_library(folder: Path) -> Path:
    """A copy of the library that these tests run on, with its record, in a cache of its own."""
    for path in (source := Path(library.describe()["path"])), source.with_suffix(".json"):
        shutil.copy(path, folder)
    return folder / source.name


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert "cannot write" in _in_a_fresh_process(SAYS, LOOPSERVE_CACHE=str(blocked / "cache"))


@needs_library
def test_a_broken_library_in_the_cache_is_built_again(tmp_path: Path) -> None:
    assert "cpu" in _in_a_fresh_process(SAYS, LOOPSERVE_CACHE=str(tmp_path)).split()[0]
    (made,) = tmp_path.glob("native-*.so")
    made.write_bytes(b"not a library")
    assert "cpu" in _in_a_fresh_process(SAYS, LOOPSERVE_CACHE=str(tmp_path)).split()[0]


@needs_library
def test_an_unknown_instruction_set_is_named() -> None:
    code = "from loopserve.kernels.native import library; print(library.unavailable())"
    said = _in_a_fresh_process(code, LOOPSERVE_CPU_LEVEL="avx1024")
    assert "LOOPSERVE_CPU_LEVEL=avx1024 is unknown (known: " in said


@needs_library
def test_a_long_tail_of_small_weights_is_not_lost() -> None:
    """Each of 65,536 keys weighs little beside one: added one by one to a large sum, they would round away."""
    total, dim = 65536, 32
    queries, values = torch.ones(1, 1, dim), torch.zeros(1, total, dim)
    keys = torch.full((1, total, dim), -1.0)
    keys[0, 0], values[0, 1:] = 1.0, 1.0
    scaling = 11.0 / (2 * dim)  # the other keys weigh e^-11 each, together 1.09 of the first
    tail = (total - 1) * math.exp(-11)
    with backend.use("cpu"):
        scores = token_scores(queries, keys, torch.tensor([total - 1]), scaling=scaling)
        output, _ = dense_attention(queries.expand(1, 8, dim), keys, values, scaling=scaling, need_lse=True)
    assert float(scores[0, 0]) == pytest.approx(1 / (1 + tail), rel=2e-4)
    assert float(scores.double().sum()) == pytest.approx(1.0, abs=2e-4)
    assert float(output[0, -1, 0]) == pytest.approx(tail / (1 + tail), rel=2e-4)


@needs_library
@pytest.mark.skipif(platform.machine() != "x86_64", reason="only there does the compiled attention round them")
def test_no_time_is_spent_on_subnormal_weights() -> None:
    """A processor takes some hundred cycles for each; keys that weigh e^-85 beside one are not worth it."""
    total, dim, tiny = 256, 32, torch.finfo(torch.float32).tiny
    queries, values = torch.ones(1, 64, dim), torch.zeros(1, total, dim)
    keys = torch.full((1, total, dim), -1.0)
    keys[0, 0], values[0, 1:] = 1.0, 1e-5
    scaling = 85.0 / (2 * dim)  # a weight is a normal number, its product with a value is none
    with backend.use("cpu"):
        output, _ = dense_attention(queries, keys, values, scaling=scaling, need_lse=True)
    assert not bool(((output != 0) & (output.abs() < tiny)).any())
    assert float(torch.full((1,), tiny) * 0.5) > 0, "the thread's own arithmetic is as before"
