"""``bench kernels``: complete rows, paired ratios, and never a speed for a wrong result."""

from __future__ import annotations

import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend

from loopserve.bench import heads as bench_heads
from loopserve.bench.heads import Heads
from loopserve.bench.rows import Row, quantiles
from loopserve.bench.speed import kernels
from loopserve.bench.speed import sides as paired_sides
from loopserve.bench.speed.decode_ops import decode_case
from loopserve.bench.speed.kernels import BACKENDS, CpuTarget, flex_mask, flex_rival, fused_dense, measure, run_kernels
from loopserve.bench.speed.parity import Candidate, Case
from loopserve.bench.speed.prefill_ops import prefill_case
from loopserve.bench.speed.sides import Runner, Watched, paired_runs, watched
from loopserve.bench.speed.suite import KernelPrefill, load_suite
from loopserve.cli import main
from loopserve.core.errors import ConfigError
from loopserve.core.policy.interfaces import DecodeCompressor
from loopserve.core.policy.patterns import LinePattern
from loopserve.kernels.backend import Operation
from loopserve.policies.decode.full import FullDecode
from tests.bench.speed.small import by_op, suite

PREFILL_OPS = [
    "line_scores",
    "select_lines",
    "choose_lines",
    "vertical_slash",
    "block_sparse",
    "dense_attention",
    "sparse_prefill",
]
ALWAYS = {"op", "shape", "dtype", "data", "pattern", "impl", "parity", "suite", "rel_err", "rel_err_pattern"}
ALWAYS |= {"threads", "device", "versions", "commit", "date"}
TIMES = {"median_ms", "q20_ms", "q80_ms", "runs", "ratio_sdpa", "ratio_own_dense", "sdpa", "sdpa_ms", "own_dense"}


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    prefill = {"query_heads": 4, "kv_heads": 2, "tokens": 1024, "ops": PREFILL_OPS}
    return list(
        run_kernels(
            suite(
                prefill_kernels=[prefill, {**prefill, "new_tokens": 130, "dense_heads": 1, "dtypes": ["float32"]}],
                decode_kernels=[{"tokens": 320, "query_heads": 4, "kv_heads": 2, "budget": 64, "batch": 2}],
            )
        )
    )


def test_every_operation_gets_a_complete_row(rows: list[Row]) -> None:
    assert all(row.keys() >= ALWAYS | TIMES for row in rows)
    assert {row["op"] for row in rows} == {
        *PREFILL_OPS, "token_scores", "gather_kv", "decode_attention", "sparse_decode"
    }  # fmt: skip
    assert {row["dtype"] for row in rows} == {"float32", "bfloat16"}
    assert all(row["parity"] == "ok" and row["impl"] for row in rows)
    assert all(row["q20_ms"] <= row["median_ms"] <= row["q80_ms"] for row in rows)
    json.dumps(rows)


def test_rows_say_what_was_computed(rows: list[Row]) -> None:
    row = next(row for row in rows if row["op"] == "sparse_prefill" and row["dtype"] == "float32")
    assert 0 < row["pattern"]["cell_density"] <= row["pattern"]["tile_density_most"] <= 1
    assert set(row["impl_parts"]) == {"choose_lines", "vertical_slash"}
    assert row["tile_throughput"] > 0 and row["choosing_share"] > 0
    assert row["rel_err_pattern"] < 1e-4 < row["rel_err"]  # exact under its pattern, not beside dense
    later = [row for row in rows if row["shape"]["m"] == 130]
    assert later and all(row["scaled_from_heads"] == 2 and "past + causal" in row["sdpa"] for row in later)
    assert all("ratio_eager" in row and row["shape"]["batch"] == 2 for row in rows if row["op"] == "sparse_decode")


def wrong(op: str, change: Callable[[Any], Any]) -> Callable[[Operation, str], Callable[..., Any]]:
    """Every implementation of an operation but the reference gives something else."""
    right = Operation.implementation

    def implementation(self: Operation, name: str) -> Callable[..., Any]:
        found = right(self, name)
        if self.name != op or name == "reference":
            return found
        return lambda *args, **options: change(found(*args, **options))

    return implementation


def one_row_off(result: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    output = result[0].clone()
    output[1, -1] *= 1.1  # a single row of a single head
    return output, *result[1:]


@pytest.mark.parametrize(
    ("op", "change", "refused"),
    [
        ("vertical_slash", one_row_off, {"vertical_slash", "sparse_prefill"}),
        ("line_scores", lambda found: (found[0], found[1] * 1.1, found[2]), {"line_scores"}),
        ("select_lines", lambda found: (found[0] & (torch.arange(200) < 50), *found[1:]), {"select_lines"}),
        ("block_sparse", lambda found: (found[0] * torch.nan, found[1]), {"block_sparse"}),
        ("dense_attention", one_row_off, {"dense_attention"}),
        (
            "vertical_slash",
            lambda _: (_ for _ in ()).throw(RuntimeError("broken")),
            {"vertical_slash", "sparse_prefill"},
        ),
    ],
)
def test_a_wrong_result_gets_no_speed(
    monkeypatch: pytest.MonkeyPatch, op: str, change: Callable[[Any], Any], refused: set[str]
) -> None:
    monkeypatch.setattr(Operation, "implementation", wrong(op, change))
    part = KernelPrefill(tokens=200, query_heads=2, kv_heads=1, ops=tuple(PREFILL_OPS), dtypes=("float32",))  # type: ignore[arg-type]
    rows = by_op(measure(prefill_case(part, "cpu"), CpuTarget(), runs=1))
    assert {name for name, row in rows.items() if row["parity"] == "failed"} == refused
    for name in refused:
        assert rows[name]["error"] and "median_ms" not in rows[name] and "ratio_sdpa" not in rows[name]
    assert all("median_ms" in row for name, row in rows.items() if name not in refused)
    if op == "dense_attention":  # no ratio to a baseline that is wrong
        assert "ratio_own_dense" not in rows["vertical_slash"]


def test_the_command_line_ends_with_1_for_a_wrong_result(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Any
) -> None:
    monkeypatch.setattr(Operation, "implementation", wrong("vertical_slash", one_row_off))
    file = tmp_path / "mine.yaml"
    file.write_text(
        "version: 1\nname: mine\nruns: 1\nprefill_kernels:\n"
        "  - {tokens: 200, query_heads: 2, kv_heads: 1, dtypes: [float32], ops: [vertical_slash, line_scores]}\n"
    )
    arguments = ("bench", "kernels", "--suite", str(file), "--format", "json", "--output", str(tmp_path / "rows.jsonl"))
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    out, err = capsys.readouterr()
    assert ended.value.code == 1
    assert "error: vertical_slash (float32) is not timed, its result is wrong: worst row" in err
    found = by_op(json.loads(out)["rows"])
    assert found["vertical_slash"]["parity"] == "failed" and found["line_scores"]["parity"] == "ok"
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == 2
    with pytest.raises(SystemExit) as ended:
        main((*arguments, "--only", "line_score"))
    assert ended.value.code == 2 and "did you mean 'line_scores'" in capsys.readouterr().err


def test_sides_run_in_turn_and_ratios_are_taken_round_by_round(monkeypatch: pytest.MonkeyPatch) -> None:
    order = []
    sides = {name: Runner(lambda name=name: order.append(name), scale) for name, scale in (("a", 1.0), ("b", 4.0))}

    def clock(run: Callable[[], object]) -> float:
        run()
        return float(len(order))  # later is slower

    found = paired_runs(sides, 3, clock)
    assert order == ["a", "b"] * 3
    assert found == {"a": [1.0, 3.0, 5.0], "b": [8.0, 16.0, 24.0]}
    assert quantiles([1.0, 2.0, 3.0]) == pytest.approx((1.4, 2.0, 2.6))

    def drifting(runners: dict[str, Runner], runs: int, clock: object) -> dict[str, list[float]]:
        return {name: [1.0, 10.0] if name == "sdpa" else [0.5, 5.0] for name in runners}

    monkeypatch.setattr(kernels, "paired_runs", drifting)
    part = KernelPrefill(tokens=200, query_heads=2, kv_heads=1, ops=("line_scores",), dtypes=("float32",))
    (row,) = measure(prefill_case(part, "cpu"), CpuTarget(), runs=2)
    assert row["ratio_sdpa_q20"] == row["ratio_sdpa"] == row["ratio_sdpa_q80"] == 2.0  # the drift falls out


def test_watching_ends_with_its_block() -> None:
    before = Operation.__call__, Operation.implementation
    with pytest.raises(ZeroDivisionError), watched():
        raise ZeroDivisionError
    assert (Operation.__call__, Operation.implementation) == before


def test_the_bundled_models_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_heads, "_LONGEST", 600)
    bench_heads._recorded.cache_clear()
    cut, repeated = bench_heads.model_heads(8, 64, 400), bench_heads.model_heads(2, 900, 900)
    assert cut.queries.shape == (8, 64, 64) and cut.keys.shape == (4, 400, 64) and "cut to 400" in cut.data
    assert repeated.keys.shape == (1, 900, 64) and "repeated to 900" in repeated.data
    with pytest.raises(ConfigError, match="18 query heads cannot be had"):
        bench_heads.model_heads(18, 64, 400)
    bench_heads._recorded.cache_clear()


class GpuOnCpu(CpuTarget):
    """What the GPU part does, with the one fused attention that a CPU has, and FlexAttention as it is without a compiler."""

    def dense(self, heads: Heads, dtypes: tuple[torch.dtype, ...]) -> dict[str, Callable[[], object]]:
        return fused_dense(heads, dtypes, {"math": SDPBackend.MATH})

    def rivals(self, case: Case) -> list[Candidate]:
        return [flex_rival(each, compiled=False) for each in case.candidates if each.op == "vertical_slash"]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_the_gpu_suite_runs_on_a_cpu_when_it_is_small() -> None:
    gpu = load_suite("gpu")
    small = {"query_heads": 4, "kv_heads": 2, "head_dim": 32, "dtypes": ("float32",), "density": 0.4, "tokens": 384}
    for part in gpu.prefill_kernels:
        changes = small | {"new_tokens": 200 if part.new_tokens else None}
        if part.data != "planted":
            changes["density"] = None
        rows = measure(prefill_case(part.model_copy(update=changes), "cpu"), GpuOnCpu(), runs=1)
        assert all(row["parity"] == "ok" and row["sdpa"] == "sdpa float32 math" for row in rows), rows
        rival = next(row for row in rows if row["impl"] == "flex_attention")
        assert rival["op"] == "vertical_slash" and rival["ratio_sdpa"] > 0 and rival["rel_err_pattern"] < 1e-4
    (steps,) = gpu.decode_kernels
    small = {
        "query_heads": 4,
        "kv_heads": 2,
        "head_dim": 32,
        "dtypes": ("float32",),
        "tokens": 384,
        "budget": 64,
        "batch": 2,
    }
    assert all(
        row["parity"] == "ok" for row in measure(decode_case(steps.model_copy(update=small), "cpu"), GpuOnCpu(), 1)
    )
    assert BACKENDS.keys() == {"flash", "cudnn", "efficient"}
    with pytest.raises(ConfigError, match="torch sees no GPU"):
        kernels.target_for("cuda")


def test_a_block_mask_holds_the_tiles_that_lines_touch() -> None:
    draw = torch.Generator().manual_seed(0)
    verticals, slashes = (torch.rand(2, 700, generator=draw) < 0.003 for _ in range(2))
    lines = LinePattern(verticals, slashes, 300)
    mask = flex_mask(lines)
    cells = torch.nn.functional.pad(lines.to_mask(), (0, -700 % 128, 0, -300 % 128))
    touched = cells.view(2, 3, 128, 6, 128).any(4).any(2)
    held = mask.to_dense()[0].bool()
    assert bool((held >= touched).all()) and int(held.sum()) <= int(touched.sum()) + 6  # more only where a tile is cut


def test_time_goes_to_the_innermost_that_is_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(paired_sides, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    seen = Watched()

    def wait(seconds: float) -> None:
        now[0] += seconds

    def outer() -> None:
        wait(1.0)
        seen.clocked("inner", lambda: wait(5.0))
        wait(0.5)

    seen.clocked("outer", outer)
    assert seen.seconds == {"inner": 5.0, "outer": 1.5}
    assert seen.shares(10.0) == {"inner": 0.5, "outer": 0.15}
    with watched([FullDecode]):
        assert FullDecode.after_forward is not DecodeCompressor.after_forward
    assert "after_forward" not in FullDecode.__dict__
