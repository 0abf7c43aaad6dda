"""Asking a suite: what is recorded, what errors do, and that equal budgets are equal."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from loopserve.api import Engine, load_stack
from loopserve.bench import metrics
from loopserve.bench.budget import budget_of
from loopserve.bench.quality.records import Run, key_of, open_run
from loopserve.bench.quality.runner import Examiner, Settings, Step, run_suite
from loopserve.bench.quality.suite import QualitySuite, contestants
from loopserve.bench.quality.summary import summarise
from loopserve.bench.quality.tables import problems
from loopserve.core.errors import ConfigError
from loopserve.models.loading import load
from tests.bench.quality.small import BAD_LAYER, SNAPKV, WINDOW, Words, ask, random_model

PROMISED = {
    "stack", "task", "sample", "turn", "position", "labels", "metric", "answer", "score", "parts", "ttft_ms", "tpot_ms",
    "prompt_tokens", "reused_tokens", "output_tokens", "prefill_cell_density", "prefill_tile_density", "coverage_estimated",
    "coverage_held_out", "coverage_realised", "attended_pairs", "kv_bytes_per_token", "kv_bytes_per_token_with_observation",
    "reselected_steps", "compressed_share", "store_bytes", "active_bytes", "fallbacks", "agreement", "budget",
}  # fmt: skip
RECALL: dict[str, Any] = {"task": "multi_key", "tokens": 600, "turns": 2, "keys": 2, "dialogues": 1}


def suite(**changes: Any) -> QualitySuite:
    return QualitySuite.model_validate({"version": 1, "name": "test", "tasks": [RECALL], **changes})


def test_every_turn_of_every_stack_is_recorded_dense_first() -> None:
    records = ask(Words(), Words("more"), stacks=("loopserve", SNAPKV), coverage=True)
    asked = [(r["task"], r["sample"], r["stack"], r["turn"]) for r in records]
    stacks = ("dense", "loopserve", "snapkv")
    assert asked == [(t, str(s), k, n) for t in ("words", "more") for s in range(3) for k in stacks for n in range(2)]
    assert all(record.keys() >= PROMISED for record in records)
    for record in records:
        assert (record["agreement"] is None) == (record["stack"] == "dense")
        assert record["reused_tokens"] == (0 if record["turn"] == 0 else records[0]["prompt_tokens"] + 5)
        assert record["coverage_realised"] is not None and record["store_bytes"] > 0


def test_the_bundled_model_answers_and_agreement_is_seen_before_answers_change() -> None:
    found = run_suite(suite(), stacks=["snapkv", "loopserve"], attended=[0.1]).records
    whole = run_suite(suite(), stacks=["snapkv"], attended=()).records  # a budget larger than the conversation: dense
    rows = {row["stack"]: row for row in [*summarise(whole, "stack"), *summarise(found, "stack")]}
    assert rows["dense"]["score"] == rows["snapkv"]["score"] == rows["snapkv"]["same_answer"] == 1.0
    assert rows["snapkv"]["kl"] < 1e-9 < rows["loopserve@0.1"]["kl"] < rows["snapkv@0.1"]["kl"]
    assert rows["snapkv@0.1"]["score"] < 1.0


def test_an_equal_budget_is_a_share_of_what_dense_attends_to() -> None:
    tasks = [{**RECALL, "tokens": [500, 1500], "keys": 1, "position": "end"}]
    found = run_suite(suite(tasks=tasks), stacks=["snapkv", "streaming_llm"], attended=[0.1, 0.2]).records
    for row in summarise(found, "stack", "tokens"):
        share = float(row["stack"].partition("@")[2] or 1)
        # Answers that go on for too long attend to more outputs than gold answers would.
        assert row["attended_fraction"] == pytest.approx(share, rel=0.6 if row["tokens"] < 1000 else 0.2), row["stack"]
    budgets = {(r["stack"], r["sample"]): r["budget"] for r in found}
    assert budgets["snapkv@0.1", "500-end-keys1-0000"] < budgets["streaming_llm@0.1", "500-end-keys1-0000"] < 55
    assert budgets["dense", "500-end-keys1-0000"] is None


def test_history_is_gold_or_what_the_model_said() -> None:
    gold = ask(Words(dialogues=1, turns=3))
    generated = ask(Words(dialogues=1, turns=3), history="generated")
    assert [r["answer"] for r in gold if r["turn"] == 0] == [r["answer"] for r in generated if r["turn"] == 0]
    assert gold[2]["reused_tokens"] != generated[2]["reused_tokens"]  # gold has four words, a random model never stops
    assert "kl" in gold[-1]["agreement"] and "kl" not in generated[-1]["agreement"]
    assert generated[-1]["agreement"].keys() == {"first_token", "answer"}


def test_a_turn_that_asks_nothing_is_given_and_not_scored() -> None:
    records = ask(Words(dialogues=1, turns=3, unanswered=[1]))
    assert [record["score"] is None for record in records if record["stack"] == "dense"] == [False, True, False]
    assert all(row["turns"] == 2 for row in summarise(records, "stack"))
    assert records[2]["reused_tokens"] > records[1]["reused_tokens"] + records[1]["prompt_tokens"]


def test_what_goes_wrong_is_recorded_and_the_run_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    once = iter([RuntimeError("out of memory\nat some place")])
    real = metrics.score

    def fails_once(*arguments: Any) -> float:
        for error in once:
            raise error
        return real(*arguments)

    monkeypatch.setattr(metrics, "score", fails_once)
    task = Words(dialogues=4, broken=[1], too_long=[2])
    found = run_words(task, [SNAPKV, BAD_LAYER])
    errors = {key_of(r): r["error"] for r in found.records if "error" in r}
    kinds = [(each["kind"], each["why"]) for each in errors.values()]
    assert kinds[0][0] == "refused" and "layers[0].at: 7 does not fit the model, which has layers 0 to 1" in kinds[0][1]
    assert kinds[1:] == [("failed", "RuntimeError: out of memory"), ("broken", "the row has no 'question'")]
    asked = [(r["sample"], r["stack"]) for r in found.records if "error" not in r and r["turn"] == 0]
    assert asked == [("0", "snapkv"), ("2", "dense"), ("2", "snapkv"), ("3", "dense"), ("3", "snapkv")]
    assert found.records[2]["agreement"] is None  # dense failed on this dialogue
    cut = [r for r in found.records if r["sample"] == "2" and "error" not in r]
    assert all(r["labels"]["truncated"] > 0 for r in cut)
    assert max(r["prompt_tokens"] + r["reused_tokens"] + r["output_tokens"] for r in cut) <= WINDOW
    counted = {(kind, count) for kind, _, count, _ in problems(found).rows}
    assert counted == {("refused", "1"), ("failed", "1"), ("broken", "1"), ("cut", "1")}


def run_words(task: Words, stacks: list[Any]) -> Any:
    records = ask(task, stacks=stacks)
    return Run({"lineup": []}, [{}], records)


def test_unknown_names_are_refused_before_anything_is_asked() -> None:
    with pytest.raises(ConfigError, match="unknown stack 'snapk'; did you mean 'snapkv'"):
        run_suite(suite(), stacks=["snapk"])
    with pytest.raises(ConfigError, match="suite 'test' has no task 'recall' "):
        run_suite(suite(), tasks=["recall"])
    with pytest.raises(ConfigError, match=r"--attended 1\.5: must be from 0 \(a stack's own budget\) to 1"):
        run_suite(suite(), attended=[1.5])
    with pytest.raises(ConfigError, match="a stack called 'dense' is not dense"):
        run_suite(suite(), stacks=[SNAPKV | {"name": "dense"}])
    with pytest.raises(ConfigError, match="unknown metric 'exactmatch'; did you mean 'exact_match'"):
        ask(Words(metric="exactmatch"))
    other = {**SNAPKV, "decode": {"policy": "snapkv", "budget": 50, "window": 8}}
    with pytest.raises(ConfigError, match="two different stacks are called 'snapkv'"):
        contestants([load_stack(SNAPKV), load_stack(other)])


def test_a_stack_given_twice_takes_part_once_and_only_budgets_are_shared_out() -> None:
    lineup = contestants([load_stack(each) for each in ("dense", "snapkv", "snapkv", "a_shape")], [0.1, 0.2])
    assert [each.name for each in lineup] == ["dense", "snapkv@0.1", "snapkv@0.2", "a_shape"]
    assert [each.family for each in lineup] == ["dense", "snapkv", "snapkv", "a_shape"]
    assert len({each.digest for each in lineup}) == 4 and budget_of(lineup[3].stack) is None


def test_a_share_is_met_by_budgets_with_outputs_and_without() -> None:
    """Long answers: what is attended beside a budget counts."""
    shapes = {
        "streaming_llm": {"policy": "streaming_llm", "budget": 64, "sink_tokens": 4},
        "quest": {"policy": "quest", "budget": 64, "page": 4},
        "h2o": {"policy": "h2o", "budget": 64},
        "not rolling": {"policy": "h2o", "budget": 64, "rolling": False},
        "snapkv": {"policy": "snapkv", "budget": 64, "window": 8},
        "everything": {"policy": "loopserve", "budget": 64, "scope": "all"},
    }
    for name, decode in shapes.items():
        stack = load_stack({"name": name, "prefill": {"policy": "dense"}, "decode": decode})
        (each,) = contestants([stack], [0.2])
        inside = name not in ("not rolling", "snapkv")
        assert budget_of(each.fitted([1000], [100])) == (200 if inside else 150), name


def test_shares_reach_stacks_of_any_shape() -> None:
    rocket = contestants([load_stack("rocketkv_mt")], [0.3])[0].fitted([20000], [10])
    assert budget_of(rocket) == 5995 and rocket.describe()["decode"]["filter_budget"] > 4 * 5000
    least = contestants([load_stack("loopserve")], [0.02])[0].fitted([100], [10])
    assert budget_of(least) == 16 and least.describe()["decode"]["page_budget"] == 3
    lineup = contestants([load_stack("snapkv"), load_stack("dense")], [0.0, 0.1])
    assert [each.name for each in lineup] == ["snapkv", "snapkv@0.1", "dense"]


def test_stacks_that_do_the_same_under_two_names_keep_their_answers_apart(tmp_path: Path) -> None:
    twins = [SNAPKV, SNAPKV | {"name": "twin"}]
    found = run_suite(suite(), stacks=twins, attended=(), directory=tmp_path / "run")
    assert open_run(tmp_path / "run").records == found.records
    again = run_suite(suite(), stacks=twins, attended=(), directory=tmp_path / "run", resume=True)
    assert again.records == found.records and {r["stack"] for r in again.records} == {"dense", "snapkv", "twin"}


def test_a_turn_that_asks_nothing_is_acknowledged_in_either_kind_of_history() -> None:
    found = [ask(Words(dialogues=1, unanswered=[0]), history=history) for history in ("gold", "generated")]
    gold, generated = ([r for r in records if r["stack"] == "dense"] for records in found)
    assert gold[0]["answer"] == generated[0]["answer"] == ""
    assert gold[0]["output_tokens"] == generated[0]["output_tokens"] > 1
    assert gold[1]["reused_tokens"] == generated[1]["reused_tokens"] > gold[0]["prompt_tokens"] + 1


def test_progress_counts_what_this_start_has_to_do() -> None:
    engine = Engine(*random_model(), "dense")
    examiner = Examiner(engine, contestants([load_stack(SNAPKV)]), Settings())
    steps: list[Step] = []
    task = Words(dialogues=3, broken=[1])
    groups = list(examiner.run([task], progress=steps.append))
    assert [(step.done, step.total) for step in steps] == [(count, 5) for count in range(1, 6)]
    done = {key_of(group[0]) for group in groups[:2]}
    rest = list(examiner.run([task], done, steps.append))
    assert [step.total for step in steps[5:]] == [3] * 3
    assert without_times(rest) == without_times(groups[2:])


def test_a_dialogue_left_in_the_middle_of_its_stacks_still_agrees_with_dense() -> None:
    engine = Engine(*random_model(), "dense")
    examiner = Examiner(engine, contestants([load_stack(SNAPKV)]), Settings())
    groups = list(examiner.run([Words(dialogues=1)]))
    rest = list(examiner.run([Words(dialogues=1)], {key_of(groups[0][0])}))
    assert without_times(rest) == without_times(groups[1:]) and rest[0][0]["agreement"]["kl"] > 0


def without_times(groups: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    return [record | {"ttft_ms": 0, "tpot_ms": 0} for group in groups for record in group]


def test_a_seed_gives_the_same_records_and_another_seed_others() -> None:
    first, again, other = ask(Words(), seed=1), ask(Words(), seed=1), ask(Words(), seed=2)
    assert without_times([first]) == without_times([again])
    assert all(a["gold"] != b["gold"] for a, b in zip(first, other, strict=True))
    assert len(list(groupby(ask(Words(), limit=2), key=key_of))) == 4


def test_a_loaded_model_can_be_handed_over() -> None:
    loaded = load("demo")
    found = run_suite(suite(limit=1), model=loaded, stacks=["dense"], agreement=False)
    assert found.identity["model"]["name"] == "LlamaForCausalLM" and found.stacks == ["dense"]
    assert found.identity["model"]["digest"] == run_suite(suite(limit=1), stacks=["dense"]).identity["model"]["digest"]
