"""The published set's schema, on shipped rows, broken ones and layouts of a local copy; what is unclear is asked, not guessed."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from loopserve.bench.metrics import score
from loopserve.bench.samples import BrokenSample, Sample
from loopserve.bench.tasks import task_by_name
from loopserve.bench.tasks.published import PublishedTask
from loopserve.core.errors import ConfigError

REPOSITORY = "TreeAILab/Multi-turn_Long-context_Benchmark_for_LLMs"


def task(source: Path | str = "shipped", **options: Any) -> PublishedTask:
    made = task_by_name("published", {"source": str(source), **options})
    assert isinstance(made, PublishedTask)
    return made


def turn(number: int, **changed: Any) -> dict[str, Any]:
    question = f"\nWhat is thing {number}?"
    made = {"prompt_back": f"Thing {number} is red.{question}", "question_at_back": question, "answer": f"red{number}"}
    return made | changed


def rows(count: int = 4) -> list[Any]:
    return [{"multi_turn": [turn(10 * number + each) for each in range(3)]} for number in range(count)]


def write(file: Path, lines: list[Any]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return file.parent


def local(tmp_path: Path, lines: list[Any], **options: Any) -> PublishedTask:
    return task(write(tmp_path / "multi-turn_QA.jsonl", lines), **options)


def broken(tmp_path: Path, lines: list[Any], **options: Any) -> dict[str, str]:
    found = local(tmp_path, lines, **options).samples(None, 0)
    return {each.id.removeprefix("multi-turn_QA-"): each.why for each in found if isinstance(each, BrokenSample)}


def test_shipped_rows_have_the_documented_schema_and_the_suffix_property() -> None:
    made = list(task().samples(None, 0))
    assert len(made) == 4
    for sample in made:
        assert isinstance(sample, Sample) and len(sample.turns) == 3
        for each in sample.turns:
            context = each.text.removesuffix(each.question)
            assert context + each.question == each.text and context
            assert (
                each.position == "end"
                and each.metric == "qa_f1"
                and each.labels["set"] in ("hotpotqa", "multifieldqa_en")
            )
            assert score(each.metric, each.answers[0], each.answers, each.labels) == 1


def test_the_twins_at_begin_and_middle_are_found_and_ask_the_same() -> None:
    made = list(task(position=["begin", "middle", "end"]).samples(3, 0))
    assert [sample.id.rsplit("-", 1)[1] for sample in made] == ["begin", "middle", "end"]
    begin, middle, end = (sample.turns for sample in made if isinstance(sample, Sample))
    for first, second, third in zip(begin, middle, end, strict=True):
        assert first.answers == second.answers == third.answers
        assert first.text.startswith(first.question) and third.text.endswith(third.question)
        assert first.labels["question_at"] == 0 < second.labels["question_at"] < third.labels["question_at"] < 1


def test_what_was_found_is_reported() -> None:
    report = "\n".join(task(position=["begin", "end"]).report())
    assert "configs: multi-turn_QA; in use: multi-turn_QA (4 rows)" in report
    assert "begin: prompt_front with question_at_front; end: prompt_back with question_at_back" in report
    assert "fields of a turn: prompt_front, question_at_front, prompt_middle" in report
    assert "answers: answers" in report and "name of the set: dataset" in report and "metric: by set" in report


def test_the_seed_orders_the_rows(tmp_path: Path) -> None:
    made = local(tmp_path, rows(20))
    ids = [sample.id for sample in made.samples(None, 0)]
    assert ids == [sample.id for sample in made.samples(None, 0)] != [sample.id for sample in made.samples(None, 1)]
    assert len(set(ids)) == 20 and [sample.id for sample in made.samples(5, 0)] == ids[:5]
    one = {sample.id: sample for sample in made.samples(None, 0)}
    assert one == {sample.id: sample for sample in made.samples(None, 1)}  # an id means one dialogue, whatever the seed


def test_broken_rows_are_reported_and_the_others_go_on(tmp_path: Path) -> None:
    lines = rows(9)
    del lines[1]["multi_turn"][1]["question_at_back"]
    lines[2]["multi_turn"][2]["answer"] = []
    lines[3]["multi_turn"][0]["question_at_back"] = "\nWhat else?"
    lines[4]["multi_turn"] = []
    lines[5] = {"turns": []}
    lines[6]["multi_turn"][0] = "text"
    lines[7]["multi_turn"][0]["prompt_back"] += " More text."
    assert broken(tmp_path, lines) == {
        "1-end": "turn 2: the field question_at_back is missing",
        "2-end": "turn 3: the list of answers is empty",
        "3-end": "turn 1: question_at_back is not a suffix of prompt_back",
        "4-end": "the row has no list 'multi_turn' of turns (it has multi_turn)",
        "5-end": "the row has no list 'multi_turn' of turns (it has turns)",
        "6-end": "turn 1: it is no object but str",
        "7-end": "turn 1: question_at_back is not a suffix of prompt_back",
    }
    assert len(list(local(tmp_path, lines).samples(None, 0))) == 9


def test_a_line_that_is_no_json_is_a_broken_row(tmp_path: Path) -> None:
    folder = write(tmp_path / "multi-turn_QA.jsonl", rows(2))
    with (folder / "multi-turn_QA.jsonl").open("a") as file:
        file.write("{cut")
    made = list(task(folder).samples(None, 0))
    [bad] = [each for each in made if isinstance(each, BrokenSample)]
    assert bad.id == "multi-turn_QA-2-end" and bad.why.startswith("line 3 is no JSON: ") and len(made) == 3


def test_an_unclear_position_is_asked_for_and_can_be_named(tmp_path: Path) -> None:
    lines = rows(1)
    for each in lines[0]["multi_turn"]:
        each |= {"lead_text": "What? It is red.", "lead_question": "What?"}
    with pytest.raises(ConfigError) as caught:
        local(tmp_path, lines, position="begin")
    assert str(caught.value) == (
        "published set: no field for a prompt at the begin; a turn has prompt_back, question_at_back, answer, lead_text, "
        "lead_question; name it: fields: {prompt: {begin: FIELD}}"
    )
    names = {"prompt": {"begin": "lead_text"}, "question": {"begin": "lead_question"}}
    [sample] = local(tmp_path, lines, position="begin", fields=names).samples(None, 0)
    assert isinstance(sample, Sample) and sample.turns[0].text == "What? It is red."


def test_two_candidates_are_never_chosen_from(tmp_path: Path) -> None:
    lines = rows(1)
    for each in lines[0]["multi_turn"]:
        each |= {"label": "blue", "prompt_end": each["prompt_back"]}
    with pytest.raises(ConfigError, match=r"more than one field \(prompt_back, prompt_end\) for a prompt at the end"):
        local(tmp_path, lines)
    with pytest.raises(ConfigError, match=r"more than one field \(answer, label\) for answers; there are .*name it"):
        local(tmp_path, lines, fields={"prompt": {"end": "prompt_back"}})
    [sample] = local(tmp_path, lines, fields={"prompt": {"end": "prompt_back"}, "answers": "label"}).samples(None, 0)
    assert isinstance(sample, Sample) and sample.turns[0].answers == ("blue",)


def test_scoring_follows_the_set_then_the_config_and_is_never_guessed(tmp_path: Path) -> None:
    sets = [
        {"dataset": "trec", "multi_turn": [turn(1, all_classes=["red1", "blue"])]},
        {"dataset": "samsum", "multi_turn": [turn(2)]},
        {"dataset": "unheard of", "multi_turn": [turn(3)]},
    ]
    write(tmp_path / "multi-turn_FS.jsonl", copy.deepcopy(sets))
    made = {sample.id: sample for sample in task(tmp_path, config="multi-turn_FS").samples(None, 0)}
    first, second, third = (made[f"multi-turn_FS-{number}-end"] for number in range(3))
    assert isinstance(first, Sample) and isinstance(second, Sample)
    [trec], [samsum] = first.turns, second.turns
    assert (trec.metric, trec.max_new_tokens) == ("classification", 64) and trec.labels["classes"] == ["red1", "blue"]
    assert (samsum.metric, samsum.max_new_tokens, samsum.labels["first_line"]) == ("rouge_l", 128, True)
    assert isinstance(third, BrokenSample) and "its set 'unheard of' is not known" in third.why
    write(tmp_path / "other.jsonl", rows(1))
    with pytest.raises(ConfigError, match=r"rows do not name a LongBench set, .* give metric: one of exact_match, "):
        task(tmp_path, config="other")
    [sample] = task(tmp_path, config="other", metric="edit_similarity", max_new_tokens=5).samples(None, 0)
    assert isinstance(sample, Sample)
    assert (sample.turns[0].metric, sample.turns[0].max_new_tokens) == ("edit_similarity", 5)
    with pytest.raises(ConfigError, match="unknown metric 'f1'"):
        task(tmp_path, config="other", metric="f1")


LAYOUTS = ("file", "split file", "folder", "data folder", "readme", "json", "parquet")


def layout(kind: str, folder: Path) -> Path:
    lines = rows(3)
    if kind == "file":
        write(folder / "multi-turn_QA.jsonl", lines)
        write(folder / "multi-turn_Sum.jsonl", lines[:1])
    elif kind == "split file":
        write(folder / "multi-turn_QA-train-00000-of-00002.jsonl", lines[:2])
        write(folder / "multi-turn_QA-train-00001-of-00002.jsonl", lines[2:])
        write(folder / "multi-turn_QA-test-00000-of-00001.jsonl", lines[:1])
    elif kind == "folder":
        write(folder / "multi-turn_QA" / "train.jsonl", lines)
        write(folder / "multi-turn_QA" / "test.jsonl", lines[:1])
    elif kind == "data folder":
        write(folder / "data" / "multi-turn_QA" / "rows.jsonl", lines)
    elif kind == "readme":
        write(folder / "anywhere" / "a.jsonl", lines)
        front = "configs:\n- config_name: multi-turn_QA\n  data_files:\n  - split: train\n    path: anywhere/*.jsonl\n"
        (folder / "README.md").write_text(f"---\nlicense: mit\n{front}---\n# A card\n")
    elif kind == "json":
        folder.mkdir()
        (folder / "multi-turn_QA.json").write_text(json.dumps(lines, indent=1))
    else:
        parquet = pytest.importorskip("pyarrow.parquet")
        arrow = pytest.importorskip("pyarrow")
        folder.mkdir()
        parquet.write_table(arrow.Table.from_pylist(lines), folder / "multi-turn_QA.parquet")
    return folder


@pytest.mark.parametrize("kind", LAYOUTS)
def test_every_layout_of_a_local_copy_gives_the_same_dialogues(tmp_path: Path, kind: str) -> None:
    made = list(task(layout(kind, tmp_path / "copy")).samples(None, 0))
    assert {turn.answers[0] for sample in made if isinstance(sample, Sample) for turn in sample.turns} == {
        f"red{10 * row + each}" for row in range(3) for each in range(3)
    }
    assert len(made) == 3


def test_datasets_reads_what_the_hub_would_give(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder stands for the repository: the same calls of `datasets`, without a network."""
    pytest.importorskip("datasets")
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = layout("readme", tmp_path / "copy")
    hub = task("hub", repository=str(folder))
    assert hub.report() == task(folder).report()
    ours = {tuple(turn.text for turn in each.turns) for each in hub.samples(None, 0) if isinstance(each, Sample)}
    theirs = {
        tuple(turn.text for turn in each.turns) for each in task(folder).samples(None, 0) if isinstance(each, Sample)
    }
    assert ours == theirs and len(ours) == 3
    with pytest.raises(ConfigError, match=r"no config 'multi-turn_QQ'; did you mean 'multi-turn_QA'\?"):
        task("hub", repository=str(folder), config="multi-turn_QQ")
    with pytest.raises(ConfigError, match=r"config 'multi-turn_QA', split 'test': "):
        task("hub", repository=str(folder), split="test")


def test_an_absent_set_is_one_line_with_the_command_that_gets_it(tmp_path: Path) -> None:
    command = f"hf download {REPOSITORY} --repo-type dataset --local-dir {tmp_path / 'none'}"
    with pytest.raises(ConfigError) as caught:
        task(tmp_path / "none")
    assert str(caught.value) == f"{tmp_path / 'none'} is no folder; get the published set with: {command}"
    (tmp_path / "none").mkdir()
    with pytest.raises(ConfigError, match="holds no JSON, JSONL or Parquet; get the published set with: hf download"):
        task(tmp_path / "none")


def test_a_hub_that_cannot_be_reached_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")

    def unreachable(*args: Any, **options: Any) -> None:
        raise ConnectionError("no network\nand more lines")

    monkeypatch.setattr(datasets, "get_dataset_config_names", unreachable)
    with pytest.raises(
        ConfigError, match=rf"^{REPOSITORY} cannot be had from the hub; get it with: hf download [^\n]*$"
    ):
        task("hub")


def test_an_unknown_config_lists_those_found(tmp_path: Path) -> None:
    write(tmp_path / "multi-turn_QA.jsonl", rows(1))
    with pytest.raises(
        ConfigError, match=r"no config 'multi-turn_QS'; did you mean 'multi-turn_QA'\? \(known: multi-turn_QA\)"
    ):
        task(tmp_path, config="multi-turn_QS")
    with pytest.raises(ConfigError, match="has no file of the split 'test'"):
        task(layout("readme", tmp_path / "copy"), split="test")


def test_the_version_changes_with_the_data(tmp_path: Path) -> None:
    first = local(tmp_path, rows(2)).version
    assert first == local(tmp_path, rows(2)).version != local(tmp_path, rows(3)).version
