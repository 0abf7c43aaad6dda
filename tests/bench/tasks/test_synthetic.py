"""Synthetic suites: the same seed the same samples, answers that the texts tell, labels that are true."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from loopserve.bench.metrics import part_scores, score
from loopserve.bench.recall import RecallTask, make_dialogue
from loopserve.bench.samples import AskedTurn, Sample
from loopserve.bench.tasks import task_by_name
from loopserve.bench.vocabulary import vocabulary
from loopserve.core.errors import ConfigError

KINDS: dict[str, dict[str, Any]] = {
    "recall": {"tokens": [512, 1024]},
    "multi_key": {"tokens": 1024, "keys": [2, 5]},
    "chains": {"tokens": 700},
    "list_all": {"tokens": 700},
    "list_all unnamed": {"tokens": 700, "named": False},
    "long_answers": {"tokens": 1500},
}
EACH = pytest.mark.parametrize("kind", KINDS)


def made(kind: str, limit: int | None = 12, seed: int = 0, **options: Any) -> list[Sample]:
    found = list(task_by_name(kind.split()[0], KINDS.get(kind, {}) | options).samples(limit, seed))
    assert all(isinstance(sample, Sample) for sample in found)
    return [sample for sample in found if isinstance(sample, Sample)]


def stated(sample: Sample, turn: int) -> dict[str, tuple[int, str]]:
    """Facts stated up to a turn: place -> (turn, what is said of it)."""
    facts = {}
    for number, each in enumerate(sample.turns[: turn + 1]):
        for part in each.text.replace(each.question, "").split("the code of ")[1:]:
            place, value = part.split(" . ")[0].removesuffix(" .").split(" is ", 1)
            facts[place] = number, value
    return facts


@EACH
def test_the_seed_and_nothing_else_decides(kind: str) -> None:
    assert made(kind) == made(kind)
    assert made(kind)[:5] == made(kind, limit=5)
    first, second = made(kind), made(kind, seed=1)
    assert [sample.id for sample in first] == [sample.id for sample in second]
    assert not {turn.text for sample in first for turn in sample.turns} & {
        turn.text for s in second for turn in s.turns
    }


@EACH
def test_no_dialogue_is_one_that_training_could_draw(kind: str) -> None:
    """Held-out seeds start at a billion, which training never reaches; a seed below gives other dialogues."""
    [sample] = made(kind, limit=1)
    for seed in range(3):
        trained = make_dialogue(RecallTask(tokens=512), seed)
        assert not {turn.text for turn in trained.turns} & {turn.text for turn in sample.turns}


@EACH
def test_answers_are_stated_where_the_labels_say(kind: str) -> None:
    for sample in made(kind):
        for number, turn in enumerate(sample.turns):
            facts = stated(sample, number)
            expected = []
            for place, distance in zip(turn.labels["places"], turn.labels["distances"], strict=True):
                where, value = facts[place]
                expected.append(f"{place} is {value} .")
                while value.startswith("kept in "):
                    place = value.removeprefix("kept in ")
                    where, value = facts[place]
                    expected.append(f"{place} is {value} .")
                assert distance == number - where
            assert turn.answers == (" ".join(expected),)
            assert turn.labels["parts"] == len(part_scores("", turn.answers[0]))
            assert turn.labels["distance"] == max(turn.labels["distances"])
            assert score(turn.metric, turn.answers[0], turn.answers) == 1
            assert turn.max_new_tokens > len(turn.answers[0].split())


@EACH
def test_the_question_stands_where_it_says(kind: str) -> None:
    for sample in made(kind):
        for turn in sample.turns:
            assert_placed(turn)


def assert_placed(turn: AskedTurn) -> None:
    assert turn.text.count(turn.question) == 1
    before, after = turn.text.split(turn.question)
    if turn.position == "begin":
        assert not before and after
    elif turn.position == "end":
        assert before and not after
    else:
        assert 0.3 < len(before.split()) / len((before + after).split()) < 0.7


def test_cases_take_turns_and_share_their_dialogues() -> None:
    samples = made("multi_key", limit=None, dialogues=2)
    assert len(samples) == 2 * 2 * 3 and len({sample.id for sample in samples}) == 12
    assert [sample.id[-4:] for sample in samples] == ["0000"] * 6 + ["0001"] * 6
    assert Counter(sample.turns[0].position for sample in samples[:6]) == {"begin": 2, "middle": 2, "end": 2}
    # One dialogue at three positions: the same answers.
    assert len({tuple(turn.answers for turn in sample.turns) for sample in samples[:3]}) == 1


def test_every_distance_is_asked_for() -> None:
    assert {turn.labels["distance"] for sample in made("recall", limit=60) for turn in sample.turns} == {0, 1, 2}
    for distance in (0, 1, 2):
        last = [sample.turns[-1] for sample in made("recall", distance=distance)]
        assert {turn.labels["distance"] for turn in last} == {distance}
        assert all(f"-distance{distance}-" in sample.id for sample in made("recall", distance=distance))


def test_long_answers_are_long_and_list_all_lists_everything_the_turn_states() -> None:
    for sample in made("long_answers"):
        assert all(len(turn.answers[0].split()) >= 128 for turn in sample.turns)
    for kind in ("list_all", "list_all unnamed"):
        for sample in made(kind):
            for number, turn in enumerate(sample.turns):
                fresh = [place for place, (where, _) in stated(sample, number).items() if where == number]
                assert turn.labels["places"] == fresh and len(fresh) == turn.labels["keys"]  # in the order stated
                assert all((place in turn.question.split()) == (kind == "list_all") for place in fresh)


@EACH
def test_what_the_bundled_model_was_not_trained_on_is_marked(kind: str) -> None:
    trained = kind in ("recall", "multi_key", "chains")
    assert {turn.labels["trained"] for sample in made(kind) for turn in sample.turns} == {trained}
    for beyond in ({"tokens": 4096}, {"form": "instructed"}, {"fact_share": 0.8}):
        assert not any(sample.turns[0].labels["trained"] for sample in made(kind, limit=1, **beyond))


@EACH
def test_plain_dialogues_use_words_that_the_bundled_model_knows(kind: str) -> None:
    known = set(vocabulary())
    for sample in made(kind, limit=3):
        assert {word for turn in sample.turns for word in (turn.text + " " + turn.answers[0]).split()} <= known


@EACH
def test_instructions_stand_beside_the_question_and_nowhere_else(kind: str) -> None:
    for plain, instructed in zip(made(kind), made(kind, form="instructed"), strict=True):
        for bare, turn in zip(plain.turns, instructed.turns, strict=True):
            assert turn.question.startswith(bare.question + " ")
            assert turn.text == bare.text.replace(bare.question, turn.question)
            assert turn.answers == bare.answers and turn.max_new_tokens > bare.max_new_tokens


@pytest.mark.parametrize("tokens", [512, 8000, 32_000])
def test_dialogues_have_the_length_asked_for(tokens: int) -> None:
    for sample in made("recall", limit=3, tokens=tokens):
        length = 1 + sum(3 + len(turn.text.split()) + len(turn.answers[0].split()) for turn in sample.turns)
        assert abs(length - tokens) <= 0.05 * tokens
        assert all("the code of" in turn.text.replace(turn.question, "") for turn in sample.turns)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (
            "recall",
            {"tokens": 100, "keys": 5},
            "recall: tokens 100 cannot hold 3 turns of this kind: give at least 310",
        ),
        ("recall", {"keys": 0}, "recall: keys must be at least 1, got 0"),
        ("recall", {"distance": -1}, "recall: distance must be at least 0 and goes with chain 1"),
        ("recall", {"token": 100}, "recall: token: unknown key; did you mean 'tokens'?"),
        ("recall", {"tokens": "512"}, "recall: tokens"),
        ("chains", {"distance": 1}, "chains: distance must be at least 0 and goes with chain 1"),
        ("long_answers", {"keys": 4}, "long_answers: answers of 28 words are no long answers"),
    ],
)
def test_impossible_options_are_refused_in_one_line_each(kind: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        task_by_name(kind, options)
    assert str(caught.value).splitlines()[0].startswith(message)
