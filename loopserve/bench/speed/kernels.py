"""Measure ``loopserve bench kernels``: operations beside dense attention, in one process. A wrong result gets no time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, get_args

import torch

from loopserve.bench.heads import Heads
from loopserve.bench.rows import Row, provenance, ratio, times
from loopserve.bench.speed.baselines import eager_step, fastest, sdpa
from loopserve.bench.speed.candidates import Candidate, Case, Target
from loopserve.bench.speed.decode_ops import decode_case
from loopserve.bench.speed.paired import Runner, paired_runs, wall_clock, watched
from loopserve.bench.speed.parity import Verdict
from loopserve.bench.speed.prefill_ops import prefill_case
from loopserve.bench.speed.suite import DecodeOp, PrefillOp, Suite, cases
from loopserve.core.errors import ConfigError, did_you_mean

Progress = Callable[[str], None]


class CpuTarget:
    """Time torch's SDPA in float32 and bfloat16 by the wall clock."""

    device = "cpu"

    def clock(self, run: Callable[[], object]) -> float:
        return wall_clock(run)

    def dense(self, heads: Heads, dtypes: tuple[torch.dtype, ...]) -> dict[str, Callable[[], object]]:
        """Return both precisions for any dtype of the case, since a user can choose the faster."""
        return sdpa(heads)

    def rivals(self, case: Case) -> list[Candidate]:
        return []


def target_for(device: str) -> Target:
    """Return the target of a device. Raises ConfigError for a device that is not present."""
    if device == "cpu":
        return CpuTarget()
    if not device.startswith("cuda"):
        raise ConfigError(f"device {device!r} is unknown to the benchmark (known: cpu, cuda)")
    if not torch.cuda.is_available():
        raise ConfigError(f"device {device!r}: torch sees no GPU here")
    from loopserve.bench.speed.baselines import CudaTarget

    return CudaTarget(device)


def check_ops(names: Iterable[str]) -> tuple[str, ...]:
    """Return the names of operations. Raises ConfigError for an unknown name."""
    known = (*get_args(PrefillOp), *get_args(DecodeOp))
    for name in names:
        if name not in known:
            raise ConfigError(f"unknown operation {name!r}{did_you_mean(name, known)}")
    return tuple(names)


def run_kernels(
    suite: Suite,
    *,
    device: str = "cpu",
    only: tuple[str, ...] = (),
    runs: int | None = None,
    progress: Progress = lambda _: None,
) -> Iterator[Row]:
    """Yield the rows of a suite's kernel parts, case by case. only: operations to measure, all by default."""
    target = target_for(device)
    for case, wanted in _cases(suite, device, progress):
        yield from measure(case, target, runs or wanted, only, suite.name)


def _cases(suite: Suite, device: str, progress: Progress) -> Iterator[tuple[Case, int]]:
    for part in suite.prefill_kernels:
        for each in cases(part, "tokens", "new_tokens", "head_dim", "density"):
            progress(f"{each.data}: {each.new_tokens or each.tokens} of {each.tokens} tokens, D {each.head_dim}")
            yield prefill_case(each, device), part.runs or suite.runs
    for step in suite.decode_kernels:
        for one in cases(step, "tokens", "kv_heads", "head_dim", "batch"):
            progress(f"decoding: {one.tokens} tokens, {one.kv_heads} KV heads, batch {one.batch}")
            yield decode_case(one, device), step.runs or suite.runs


@torch.inference_mode()
def measure(case: Case, target: Target, runs: int, only: tuple[str, ...] = (), suite: str = "") -> list[Row]:
    """Return one row per candidate. All are verified first; the correct ones then run in turn with the dense baselines."""
    wanted = [each for each in [*case.candidates, *target.rivals(case)] if not only or each.op in only]
    judged = {_name(each): _judge(each) for each in [*wanted, *case.own_dense.values()]}
    right = {name: each for name, each in ((_name(each), each) for each in wanted) if judged[name][1].ok}
    own = {dtype: each for dtype, each in case.own_dense.items() if judged[_name(each)][1].ok}
    rows = [_head(each, case, suite, target.device) | judged[_name(each)][0] for each in wanted]
    if not right:
        return rows
    name, best, tried = fastest(target.dense(case.dense, tuple(case.own_dense)), case.dense_scale, target.clock)
    runners = {"sdpa": best}
    if case.dense.queries.shape[1] == 1:
        runners |= {f"eager {dtype}": Runner(eager_step(case.dense, dtype)) for dtype in case.own_dense}
        for runner in runners.values():
            runner.run()  # warm, as the candidates are by now
    runners |= {_name(each): Runner(each.run, each.scale) for each in [*right.values(), *own.values()]}
    found = paired_runs(runners, runs, target.clock)
    for row, each in zip(rows, wanted, strict=True):
        if _name(each) not in right:
            continue
        seconds = found[_name(each)]
        row |= times(seconds) | ratio("ratio_sdpa", found["sdpa"], seconds)
        row |= {"sdpa": name, "sdpa_ms": times(found["sdpa"])["median_ms"], "sdpa_tried_ms": tried}
        if each.dtype in own:
            row |= ratio("ratio_own_dense", found[_name(own[each.dtype])], seconds)
            row["own_dense"] = judged[_name(own[each.dtype])][0]["impl"]
        if f"eager {each.dtype}" in found:
            row |= ratio("ratio_eager", found[f"eager {each.dtype}"], seconds)
        if row["pattern"] and "tile_density" in row["pattern"]:  # tiles per second, as a share of dense attention's
            row["tile_throughput"] = row["pattern"]["tile_density"] * row["ratio_sdpa"]
    _add_choosing(rows)
    return rows


def _add_choosing(rows: list[Row]) -> None:
    """Add ``choosing_share`` to ``sparse_prefill``: the share of line selection in its time, where that was timed as well."""
    timed = {(row["op"], row["dtype"]): row["median_ms"] for row in rows if "median_ms" in row}
    for row in rows:
        choosing = timed.get(("choose_lines", row["dtype"]))
        if row["op"] == "sparse_prefill" and "median_ms" in row and choosing is not None:
            row["choosing_share"] = choosing / row["median_ms"]


def _name(candidate: Candidate) -> str:
    """Return a name unique within a case: our dense decode attention is the same operation as the sparse one's."""
    return f"{candidate.op} {candidate.dtype} {candidate.impl} {id(candidate)}"


def _head(candidate: Candidate, case: Case, suite: str, device: str) -> Row:
    return {
        "op": candidate.op,
        "shape": case.shape,
        "dtype": str(candidate.dtype).removeprefix("torch."),
        "data": case.data,
        **case.fields,
        **candidate.fields,
        "suite": suite,
        **provenance(device),
    }


def _judge(candidate: Candidate) -> tuple[Row, Verdict]:
    """Return the fields of a candidate before it is timed: implementations, pattern, errors, parity."""
    pattern: Row | None = None
    with watched() as seen:
        try:
            found: Any = candidate.run()
            impl = candidate.impl or seen.impl(*candidate.parts)
            parts = {op: "+".join(sorted(seen.served.get(op, ()))) for op in candidate.parts}
            judged, pattern = candidate.check(found), candidate.pattern(found)
        except Exception as error:  # an implementation that raises has no result, whatever the error
            first = (str(error).strip().splitlines() or [""])[0]
            impl, parts = candidate.impl or seen.impl(*candidate.parts), {}
            judged = Verdict(float("inf"), float("inf"), None, False, f"{type(error).__name__}: {first}")
    row: Row = {"impl": impl, "pattern": pattern, "rel_err": judged.rel_err, "parity": "ok" if judged.ok else "failed"}
    if len(parts) > 1:
        row["impl_parts"] = parts
    row |= {"rel_err_pattern": judged.error, "parity_err": judged.worst}
    return row | ({} if judged.ok else {"error": judged.why}), judged
