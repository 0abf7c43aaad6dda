"""A run killed with SIGKILL at random moments and resumed gives what an undisturbed one gives, byte by byte."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest

from loopserve.bench.quality.records import TIMES, open_run, read_records
from loopserve.bench.quality.tables import tables

ROOT = Path(__file__).parents[3]
KILLS = 20


class Runs:
    """The process that begins runs; see ``killed``."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def ask(self, directory: Path, kill_after: float = 0.0) -> int:
        """Begin or resume a run; its exit code, negative if it was killed."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(f"{kill_after} {directory}\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())


@pytest.fixture
def runs() -> Iterator[Runs]:
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    with subprocess.Popen(
        [sys.executable, "-m", "tests.bench.quality.killed"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
    ) as process:
        assert process.stdout is not None and process.stdin is not None
        assert process.stdout.readline() == "ready\n"
        yield Runs(process)
        process.stdin.close()


def answers_and_page(directory: Path) -> tuple[str, str]:
    """Tables and records of a run, all but its times."""
    run = open_run(directory)
    records = [{name: value for name, value in record.items() if name not in TIMES} for record in run.records]
    return "\n".join(table.markdown() for table in tables(run, ["words"], times=False)), json.dumps(records)


def held(directory: Path) -> int:
    path = directory / "records.jsonl"
    return len(read_records(path)) if path.exists() else 0


@pytest.mark.slow
def test_a_run_killed_twenty_times_loses_and_repeats_nothing(runs: Runs, tmp_path: Path) -> None:
    started = time.monotonic()
    assert runs.ask(tmp_path / "whole") == 0
    longest = (time.monotonic() - started) / 4
    draw, directory = Random(0), tmp_path / "killed"
    killed = fruitful = 0
    while killed < KILLS:
        before = held(directory)
        code = runs.ask(directory, kill_after=draw.uniform(0.001, longest))
        assert code in (0, -signal.SIGKILL)
        killed += code != 0
        fruitful += held(directory) > before
        if held(directory) == before:
            longest *= 1.1  # the machine is busier than it was
        if code == 0:  # it came to its end before the signal: the rest of the kills go to a new one
            assert answers_and_page(directory) == answers_and_page(tmp_path / "whole")
            shutil.rmtree(directory)
    assert runs.ask(directory) == 0
    assert answers_and_page(directory) == answers_and_page(tmp_path / "whole")
    assert fruitful > 5, "the kills came before anything was recorded"
