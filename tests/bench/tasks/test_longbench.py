"""LongBench recombined, on the shipped items and on folders made here."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from loopserve.bench.metrics import METRICS, score
from loopserve.bench.samples import BrokenSample, Sample
from loopserve.bench.tasks import task_by_name
from loopserve.bench.tasks.longbench import SETS, WHERE
from loopserve.core.errors import ConfigError

SHIPPED = ("gov_report", "hotpotqa", "multifieldqa_en", "qmsum", "samsum", "trec", "triviaqa")
EACH = pytest.mark.parametrize("name", SHIPPED)


def samples(name: str, limit: int | None = None, seed: int = 0, source: str = "shipped", **options: Any) -> list[Any]:
    return list(task_by_name(f"longbench-{name}", {"source": source, **options}).samples(limit, seed))


def items(count: int = 7, **changed: Any) -> list[dict[str, Any]]:
    """Rows in LongBench's shape; `changed` replaces fields in all of them."""
    return [
        {
            "input": f"What is thing {number}?",
            "context": f"Thing {number} is red.\n\nNothing else is said of {number}.",
            "answers": [f"red{number}"],
            "all_classes": None,
            "_id": f"id{number}",
            **changed,
        }
        for number in range(count)
    ]


def write(folder: Path, rows: list[Any], name: str = "hotpotqa") -> str:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(folder)


@EACH
def test_shipped_items_become_dialogues_at_every_position(name: str) -> None:
    made = samples(name)
    assert [sample.id for sample in made] == [f"0000-{position}-distance0" for position in WHERE]
    for sample in made:
        assert isinstance(sample, Sample) and len(sample.turns) == 3
        for turn in sample.turns:
            assert turn.metric in METRICS and turn.metric == SETS[name].metric
            assert turn.max_new_tokens == SETS[name].max_new_tokens
            assert score(turn.metric, turn.answers[0], turn.answers, turn.labels) == pytest.approx(1, abs=1e-6)
            assert turn.labels["kind"] == SETS[name].kind and turn.labels["distance"] == 0


@EACH
def test_the_question_stands_where_it_says_and_nothing_is_restated(name: str) -> None:
    contexts = {}
    for sample in samples(name):
        for number, turn in enumerate(sample.turns):
            assert turn.position is not None and turn.text.count(turn.question) == 1
            before, after = turn.text.split(turn.question)
            assert WHERE[turn.position] in turn.question
            if turn.position == "begin":
                assert not before and after
            elif turn.position == "end":
                assert before and not after
            else:
                assert 0.25 < len(before) / len(before + after) < 0.75
            # What is left is the context and nothing else, the same at every position.
            rest = " ".join((before + " " + after).split())
            assert contexts.setdefault(number, rest) == rest


def test_questions_do_not_split_examples_and_bring_no_cue() -> None:
    for name, first in (("trec", "Question:"), ("samsum", "Dialogue:"), ("triviaqa", "Passage:")):
        [sample] = samples(name, position="middle")
        for turn in sample.turns:
            assert turn.text.split(turn.question)[1].lstrip().startswith(first)
            assert not turn.question.endswith(":")
            assert turn.labels["first_line"] is True
    assert "classes" in sample.turns[0].labels or name != "trec"


def test_classes_go_to_the_labels() -> None:
    [sample] = samples("trec", position="end")
    assert all(turn.answers[0] in turn.labels["classes"] for turn in sample.turns)


def test_every_item_is_used_once_and_the_seed_decides_which_meet(tmp_path: Path) -> None:
    folder = write(tmp_path, items(7))
    first = samples("hotpotqa", source=folder, position="end")
    assert first == samples("hotpotqa", source=folder, position="end")
    assert first != samples("hotpotqa", source=folder, position="end", seed=1)
    used = [turn.labels["item"] for sample in first for turn in sample.turns]
    assert len(used) == len(set(used)) == 6  # seven items, dialogues of three turns: one is left over
    assert samples("hotpotqa", limit=1, source=folder, position="end") == first[:1]
    assert len(samples("hotpotqa", source=folder, position="end", turns=7)[0].turns) == 7


@pytest.mark.parametrize("distance", [1, 2])
def test_the_cross_turn_variant_asks_of_an_earlier_context(tmp_path: Path, distance: int) -> None:
    folder = write(tmp_path, items(6))
    for sample in samples("hotpotqa", source=folder, distance=distance):
        numbers = []
        for index, turn in enumerate(sample.turns):
            if index < distance:
                assert turn.answers == () and turn.question == "" and turn.position is None
            else:
                asked = numbers[index - distance]
                assert turn.answers == (f"red{asked}",) and f"What is thing {asked}?" in turn.question
                assert f"in my message number {index - distance + 1}." in turn.question
                assert f"Thing {asked} is red" not in turn.text  # only the earlier turn states it
                assert f"Thing {asked} is red" in sample.turns[index - distance].text
                assert turn.labels["distance"] == distance and turn.labels["item"] == f"id{asked}"
            numbers.append(turn.text.split("Thing ")[1].split()[0])


def test_distances_and_positions_multiply(tmp_path: Path) -> None:
    made = samples("hotpotqa", source=write(tmp_path, items(6)), distance=[0, 1])
    assert len(made) == 2 * 2 * 3 and len({sample.id for sample in made}) == 12
    assert {sample.id[:4] for sample in made[:6]} == {"0000"}


def test_broken_rows_are_reported_with_their_reason_and_the_others_go_on(tmp_path: Path) -> None:
    rows: list[Any] = items(9)
    del rows[0]["answers"]
    rows[1]["answers"] = []
    rows[2]["answers"] = [""]
    rows[3]["context"] = "  "
    rows[4]["input"] = None
    rows[5] = ["no object"]
    rows[6]["answers"] = ["", "red6"]
    folder = write(tmp_path, rows)
    with (tmp_path / "hotpotqa.jsonl").open("a") as file:
        file.write('{"input": "cut off\n')
    made = samples("hotpotqa", limit=1, source=folder)
    broken = {each.id: each.why for each in made if isinstance(each, BrokenSample)}
    assert broken == {
        "hotpotqa-0": "the row lacks answers (it has _id, all_classes, context, input)",
        "hotpotqa-1": "the list of answers is empty",
        "hotpotqa-2": "every answer is empty",
        "hotpotqa-3": "the context is empty or no text",
        "hotpotqa-4": "the input (the question) is empty or no text",
        "hotpotqa-5": "the row is no object but list",
        "hotpotqa-9": "line 10 is no JSON: Unterminated string starting at",
    }
    [sample] = [each for each in made if isinstance(each, Sample)]
    assert {turn.labels["item"]: turn.answers for turn in sample.turns} == {f"id{n}": (f"red{n}",) for n in (6, 7, 8)}


def test_a_set_scored_by_classes_needs_them(tmp_path: Path) -> None:
    made = samples("trec", source=write(tmp_path, items(3), "trec"))
    reasons = [each.why for each in made if isinstance(each, BrokenSample)]
    assert reasons[:3] == ["all_classes is missing, without which an answer cannot be scored"] * 3
    assert reasons[3:] == ["0 usable rows are too few for 3 turns"] and len(made) == 4


def layouts(folder: Path) -> Mapping[str, Path]:
    rows = items(3)
    plain, data, own, archive, array = (folder / name for name in ("plain", "data", "own", "archive", "array"))
    write(plain, rows)
    write(data / "data", rows)
    write(own / "hotpotqa", rows, "test-00000-of-00001")
    write(folder / "unzipped", rows)
    archive.mkdir()
    with zipfile.ZipFile(archive / "data.zip", "w") as packed:
        packed.write(folder / "unzipped" / "hotpotqa.jsonl", "data/hotpotqa.jsonl")
    array.mkdir()
    (array / "hotpotqa.json").write_text(json.dumps(rows))
    return {"plain": plain, "data": data, "own": own, "archive": archive, "array": array}


@pytest.mark.parametrize("layout", ["plain", "data", "own", "archive", "array"])
def test_every_layout_of_a_local_copy_gives_the_same_dialogues(tmp_path: Path, layout: str) -> None:
    found = layouts(tmp_path)
    assert samples("hotpotqa", source=str(found[layout])) == samples("hotpotqa", source=str(found["plain"]))


def test_the_hub_is_asked_for_the_archive_and_no_script_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    archive = layouts(tmp_path)["archive"] / "data.zip"
    asked: list[tuple[Any, ...]] = []

    def download(repository: str, name: str, *, repo_type: str, revision: str | None) -> str:
        asked.append((repository, name, repo_type, revision))
        return str(archive)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert samples("hotpotqa", source="hub", revision="abc") == samples("hotpotqa", source=str(archive.parent))
    assert asked == [("THUDM/LongBench", "data.zip", "dataset", "abc")]


def test_the_version_changes_with_the_data(tmp_path: Path) -> None:
    one = task_by_name("longbench-hotpotqa", {"source": write(tmp_path / "a", items(3))})
    same = task_by_name("longbench-hotpotqa", {"source": write(tmp_path / "b", items(3))})
    other = task_by_name("longbench-hotpotqa", {"source": write(tmp_path / "c", items(4))})
    assert one.version == same.version != other.version


def test_an_absent_set_is_one_line_with_the_command_that_gets_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = f"hf download THUDM/LongBench data.zip --repo-type dataset --local-dir {tmp_path}"
    with pytest.raises(ConfigError) as caught:
        task_by_name("longbench-hotpotqa", {"source": str(tmp_path)})
    assert str(caught.value) == f"LongBench's set 'hotpotqa' is not in {tmp_path}; get it with: {command}"
    with pytest.raises(ConfigError, match=r"no items of 'musique' are shipped \(known: gov_report, hotpotqa"):
        task_by_name("longbench-musique", {"source": "shipped"})
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(
        ConfigError, match=r"^THUDM/LongBench cannot be had from the hub; get it with: hf download [^\n]*$"
    ):
        task_by_name("longbench-hotpotqa", {})


def test_a_distance_beyond_the_turns_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"distance must be from 0 to turns - 1 \(2\), got 3"):
        task_by_name("longbench-trec", {"source": "shipped", "distance": 3})
