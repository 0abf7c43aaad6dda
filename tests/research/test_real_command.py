"""``python -m research.evidence_real.agreement`` measures any text, in one turn or several, with or without a chat template."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from loopserve.models.bridge import IMPLEMENTATION, TransformersModel
from loopserve.models.layers import set_implementation
from loopserve.models.tiny import tiny_model
from research.evidence_real import agreement, case
from research.evidence_real.summary import HEADER
from research.evidence_real.texts import text
from tests.research.test_real_needles import Words


class Plain(Words):
    chat_template = None


@pytest.fixture(scope="module")
def model() -> TransformersModel:
    network = tiny_model("llama")
    set_implementation(network, IMPLEMENTATION)
    return TransformersModel(network)


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    names = []
    for number in range(2):
        path = tmp_path / f"novel_{number}.txt"
        path.write_text(text("prose", number), encoding="utf-8")
        names.append(str(path))
    return names


@pytest.fixture(params=[Words, Plain])
def measured(
    request: pytest.FixtureRequest,
    model: TransformersModel,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> object:
    for module in (agreement, case):
        monkeypatch.setattr(module, "loaded", lambda name: (model, request.param()))

    def run(*arguments: str) -> dict[str, list[str]]:
        agreement.main(arguments)
        lines = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line[:1] == "|"]
        return {name: figures for name, *figures in lines[2:]}

    return run


def kl(figures: Sequence[str]) -> float:
    return float(figures[0].split(" ")[0])


SMALL = ("--tokens", "300", "--forced", "33", "--share", "0.3")


@pytest.mark.parametrize("phase", ["decode", "both"])
def test_files_are_measured_together_and_one_by_one(measured: object, files: list[str], phase: str) -> None:
    assert callable(measured)
    rows = measured("dense", "streaming_llm", "--file", *files, *SMALL, "--phase", phase)
    names = ["", ", novel_0.txt", ", novel_1.txt"]
    assert set(rows) == {f"{stack}{name}" for stack in ("dense", "streaming_llm") for name in names}
    assert all(kl(rows[f"dense{name}"]) < 1e-4 for name in names)
    assert all(kl(rows[f"streaming_llm{name}"]) > 0 for name in names)


def test_pieces_of_a_sparse_prefill_are_as_long_as_asked_for(measured: object, files: list[str]) -> None:
    assert callable(measured)
    tail = ("--file", files[0], *SMALL, "--phase", "prefill")
    whole, pieces = (measured("minference", *tail, *more)["minference"] for more in ((), ("--chunk", "64")))
    tiles = HEADER.index("tiles") - 1
    assert whole[tiles] != pieces[tiles]  # the tiles of each piece begin at its first row


def test_a_text_is_given_over_several_turns(measured: object, files: list[str]) -> None:
    assert callable(measured)
    rows = measured("dense", "streaming_llm", "--file", files[0], "--tokens", "600", "--turns", "3", "--share", "0.3")
    assert set(rows) == {f"{stack}, turn {turn}" for stack in ("dense", "streaming_llm") for turn in (1, 2, 3)}
    assert all(kl(rows[f"dense, turn {turn}"]) < 1e-4 for turn in (1, 2, 3))


def test_turns_of_a_sparse_prefill_alone_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        agreement.main(["dense", "--turns", "2", "--phase", "prefill"])
    assert "--phase is decode or both" in capsys.readouterr().err
