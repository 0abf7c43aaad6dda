"""`loopserve calibrate`: what it measures, where it is kept, and for whom it counts."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from loopserve import Engine, load_stack
from loopserve.bench.calibration import measure
from loopserve.cli import main
from loopserve.core.engine.break_even import BreakEven, Pair
from loopserve.core.errors import ConfigError
from loopserve.models import calibration

FOUND = BreakEven(2500.0, math.inf, 0.0)


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Engine:
    monkeypatch.setattr(calibration, "cache_folder", lambda: tmp_path)
    return Engine.from_pretrained("demo", "loopserve")


def kept(engine: Engine) -> Path:
    return calibration.keep(engine.model, engine.stack, FOUND, {"decode": [Pair(2048, 1.0, 2.0)]})


def test_every_kind_of_work_is_timed_where_the_stack_acts() -> None:
    stack = {
        "version": 1,
        "prefill": {"policy": "loopserve", "alpha": 0.9, "min_total_tokens": 1000},
        "decode": {"policy": "loopserve", "budget": 128, "dense_below": 8, "page_budget": 64},
    }
    seen: list[tuple[str, int, int]] = []
    measured = measure(Engine.from_pretrained("demo", stack), [900, 2000], lambda *state: seen.append(state))
    assert [each.tokens for each in measured.long_turn] == [2000 - 256]
    assert [each.tokens for each in measured.short_turn] == [2000]  # 900 tokens are below min_total_tokens
    assert [each.tokens for each in measured.decode] == [2000]
    assert all(each.dense_s > 0 and each.sparse_s > 0 for pairs in measured for each in pairs)
    assert seen == [("900 tokens", 0, 2), ("2000 tokens", 1, 2)]


@pytest.mark.parametrize(
    ("stack", "lengths", "said"),
    [
        ("dense", [2000], "nothing to calibrate"),
        ("snapkv-evict", [2000], "evicts pairs to save memory"),
        ("loopserve", [100_000], "none of the lengths 100000 can be measured: the model takes 8192 tokens"),
    ],
)
def test_what_cannot_be_calibrated_is_refused(stack: str, lengths: list[int], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        measure(Engine.from_pretrained("demo", stack), lengths)


def test_what_was_measured_here_is_found_again(engine: Engine) -> None:
    assert calibration.find(engine.model, engine.stack).missing == calibration.NONE
    kept(engine)
    found = calibration.find(engine.model, engine.stack)
    assert found.break_even == FOUND and not found.missing
    assert calibration.find(engine.model, load_stack("snapkv")).missing == calibration.NONE  # another stack
    other = Engine.from_pretrained("demo", "loopserve", dtype="bfloat16")
    assert calibration.find(other.model, other.stack).missing == calibration.NONE  # another dtype


def test_a_calibration_of_other_conditions_does_not_count(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = kept(engine)
    content = json.loads(path.read_text())
    content["conditions"]["device"] = "another processor"
    path.write_text(json.dumps(content))
    assert calibration.calibrated(engine.model, engine.stack, "auto") is None
    assert "is not used" in (said := capsys.readouterr().err) and "another processor" in said
    kept(engine)
    threads = torch.get_num_threads()
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads + 1)
    assert f"threads {threads} there, {threads + 1} here" in calibration.find(engine.model, engine.stack).missing


@pytest.mark.parametrize(
    "content", ["", "[]", '{"version": 2}', '{"version": 1, "conditions": {}, "break_even": {"x": 1}}']
)
def test_a_damaged_file_is_said_and_left_out(engine: Engine, content: str, capsys: pytest.CaptureFixture[str]) -> None:
    kept(engine).write_text(content)
    assert calibration.calibrated(engine.model, engine.stack, "auto") is None
    assert "cannot be read" in capsys.readouterr().err


def test_an_engine_obeys_it_and_says_so(engine: Engine, capsys: pytest.CaptureFixture[str]) -> None:
    kept(engine)
    capsys.readouterr()
    obeying = Engine.from_pretrained("demo", "loopserve", break_even="auto")
    assert obeying.token_engine.slots.break_even == FOUND
    assert (
        "from 2,500 tokens on in turns of 1,024 new tokens and more, at no length in shorter ones"
        in capsys.readouterr().err
    )
    assert Engine.from_pretrained("demo", "loopserve").token_engine.slots.break_even == BreakEven()
    assert Engine.from_pretrained("demo", "dense", break_even="auto").token_engine.slots.break_even == BreakEven()
    with pytest.raises(ConfigError, match="break_even: unknown 'on'"):
        Engine.from_pretrained("demo", "loopserve", break_even="on")  # type: ignore[arg-type]


def test_the_command_prints_and_keeps(engine: Engine, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["calibrate", "demo", "--length", "2500", "--format", "json"])
    assert ended.value.code == 0
    printed = json.loads(capsys.readouterr().out)
    assert [each["tokens"] for each in printed["measured"]["short_turn"]] == [2500]
    assert Path(printed["file"]).exists()
    assert not calibration.find(engine.model, engine.stack).missing
