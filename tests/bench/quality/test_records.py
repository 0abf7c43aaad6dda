"""Records and manifest: whatever a kill leaves behind, complete samples are kept and nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loopserve.bench.quality.records import RecordFile, claim, read_manifest, read_records
from loopserve.core.errors import ConfigError

TURNS = (2, 1, 3)


def sample(number: int, turns: int) -> list[dict[str, Any]]:
    where = {"stack": "ä", "family": "ä", "digest": "d", "task": "t", "sample": str(number), "turns": turns}
    return [{**where, "turn": turn, "score": 0.5} for turn in range(turns)]


SAMPLES = [sample(number, turns) for number, turns in enumerate(TURNS)]
LINES = [json.dumps(record, ensure_ascii=False).encode() + b"\n" for group in SAMPLES for record in group]


def test_what_is_appended_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    file = RecordFile(path)
    for group in SAMPLES:
        file.append(group)
    file.close()
    assert read_records(path) == [record for group in SAMPLES for record in group] == file.records
    assert path.read_bytes() == b"".join(LINES)


@given(cut=st.integers(0, sum(map(len, LINES))))
def test_a_file_cut_anywhere_keeps_its_complete_samples_and_goes_on(
    tmp_path_factory: pytest.TempPathFactory, cut: int
) -> None:
    path = tmp_path_factory.mktemp("cut") / "records.jsonl"
    path.write_bytes(b"".join(LINES)[:cut])
    complete, end = 0, 0
    for turns in TURNS:
        end += sum(map(len, LINES[sum(TURNS[:complete]) : sum(TURNS[:complete]) + turns]))
        if end > cut:
            break
        complete += 1
    kept = [record for group in SAMPLES[:complete] for record in group]
    assert read_records(path) == kept
    file = RecordFile(path)
    assert file.records == kept
    for group in SAMPLES[complete:]:
        file.append(group)
    file.close()
    assert path.read_bytes() == b"".join(LINES)


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([LINES[0], b"nonsense\n", *LINES[1:]], ":2: not a record of a quality run"),
        ([b'{"op": "x"}\n', *LINES], ":1: not a record of a quality run"),
        ([LINES[0], *LINES[2:]], "turns are missing, doubled or out of order"),
        ([LINES[0], LINES[1], LINES[1], LINES[2]], "turns are missing, doubled or out of order"),
        ([LINES[1], LINES[0]], "turns are missing, doubled or out of order"),
    ],
)
def test_a_file_that_was_edited_is_refused(tmp_path: Path, lines: list[bytes], said: str) -> None:
    path = tmp_path / "records.jsonl"
    path.write_bytes(b"".join(lines))
    with pytest.raises(ConfigError, match=said):
        read_records(path)


def test_two_runs_cannot_write_to_one_file(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    file = RecordFile(path)
    with pytest.raises(ConfigError, match="another run is writing to it"):
        RecordFile(path)
    file.close()
    RecordFile(path).close()


IDENTITY = {"model": {"name": "m", "digest": "1"}, "stacks": {"a": {"digest": "x"}}, "lineup": ["a"]}


def test_a_directory_is_claimed_once_and_gone_on_with_by_the_same_run_only(tmp_path: Path) -> None:
    directory = tmp_path / "deep" / "run"
    claim(directory, IDENTITY, {"date": 1}, resume=True)  # nothing there yet: it begins
    with pytest.raises(ConfigError, match="holds a run already: go on with --resume"):
        claim(directory, IDENTITY, {"date": 2}, resume=False)
    claim(directory, IDENTITY, {"date": 2}, resume=True)
    assert read_manifest(directory)["sessions"] == [{"date": 1}, {"date": 2}]
    other = {"model": {"name": "m", "digest": "2"}, "stacks": {"b": {"digest": "x"}}, "lineup": ("a",)}
    with pytest.raises(ConfigError) as refused:
        claim(directory, other, {"date": 3}, resume=True)
    said = str(refused.value)
    assert 'model.digest was "1" and is "2"' in said and 'stacks.a was {"digest": "x"} and is absent' in said
    assert "lineup" not in said and len(said.splitlines()) == 3
    assert len(read_manifest(directory)["sessions"]) == 2


def test_what_is_no_run_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(ConfigError, match="is not empty and holds no run"):
        claim(tmp_path, IDENTITY, {}, resume=True)
    assert [each.name for each in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(ConfigError, match="no quality run"):
        read_manifest(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(ConfigError, match="damaged"):
        read_manifest(tmp_path)
