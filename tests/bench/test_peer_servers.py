"""The comparison of servers: one that answers is measured, one that does not start is recorded, and nothing is left running."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.peers import servers
from benchmarks.peers.servers import Load, Server, measure
from loopserve.bench.peers import servers_markdown
from loopserve.bench.rows import read_rows
from loopserve.models.demo import bundled_path

LOAD = Load(conversations=2, turns=2, first_words=8, words=4, output_tokens=4)


@pytest.fixture(autouse=True)
def bundled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers, "folders", lambda model, cache: (bundled_path("demo"), None))


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    begun: list[Any] = []
    original = subprocess.Popen

    def noted(*arguments: Any, **options: Any) -> Any:
        begun.append(original(*arguments, **options))
        return begun[-1]

    monkeypatch.setattr(servers.subprocess, "Popen", noted)
    return begun


def test_a_server_is_measured_under_the_load_and_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processes: list[Any]
) -> None:
    output = tmp_path / "rows.jsonl"
    for _ in range(2):  # the second time nothing is left to do
        arguments = [
            "--servers",
            "loopserve serve",
            "--rounds",
            "1",
            "--threads",
            "1",
            "--quick",
            "--output",
            str(output),
        ]
        monkeypatch.setattr(sys, "argv", ["servers", *arguments, "--environments", str(tmp_path)])
        servers.main()
    (row,) = read_rows(output)
    assert (row["figures"]["completed"], row["figures"]["failed"], row["figures"]["total_output_tokens"]) == (4, 0, 32)
    assert row["figures"]["cached_share"] > 0 and "loopserve" in row["versions"] and row["threads"] == 1
    assert str(tmp_path) not in json.dumps(row) and str(Path.cwd()) not in json.dumps(row), "rows name no paths"
    assert "| loopserve serve | 4 of 4 |" in servers_markdown([row])
    assert all(each.poll() is not None for each in processes)


def test_a_server_that_does_not_start_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(servers.SERVERS, "none", Server("own", "{python} -c exit()", ()))
    assert measure("none", tmp_path, LOAD, 1) == {"error": "the server did not answer within 600 s, or ended"}
