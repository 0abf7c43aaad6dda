"""Metrics against values computed by hand; the arithmetic stands beside each."""

from __future__ import annotations

import importlib.metadata
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loopserve.bench import metrics
from loopserve.bench.metrics import METRICS, part_accuracy, part_scores, score
from loopserve.core.errors import ConfigError

CLASSES = ["number", "Other number", "Date", "City"]
TEXT = st.text(alphabet="ab .,\nThe", max_size=40)


def test_the_normal_form_drops_case_punctuation_and_articles_in_this_order() -> None:
    assert metrics.normalise(" The  Cat,\nan a.m. (THE end)!") == "cat am end"
    # Punctuation goes first, so a hyphen joins words, and an article inside what it joined stays.
    assert metrics.normalise("state-of-the-art") == "stateoftheart"


def test_qa_f1() -> None:
    # "cat sat on mat" against "cat on mat": 3 in common, precision 3/4, recall 3/3: 2 x .75 x 1 / 1.75 = 6/7
    assert score("qa_f1", "The cat sat on a mat.", ["cat on the mat"]) == pytest.approx(6 / 7)
    # counts matter: red and blue once each of {red 2, blue 1} and {red 1, blue 2}: 2/3 and 2/3
    assert score("qa_f1", "red red blue", ["red blue blue"]) == pytest.approx(2 / 3)
    assert score("qa_f1", "", ["red"]) == score("qa_f1", "the", ["a"]) == 0


def test_the_best_of_several_answers_counts() -> None:
    # "big red" against "red": 1 in common, 1/2 and 1: 2/3; against "big red bus": 2 in common, 1 and 2/3: 4/5
    assert score("qa_f1", "big red", ["red", "green", "big red bus"]) == pytest.approx(4 / 5)
    assert score("qa_f1", "big red", []) == 0


def test_rouge_l_is_that_of_the_package_rouge() -> None:
    # The common subsequence is "the cat on mat": 4 words. The package counts every word once: 5 in the prediction
    # (the, cat, sat, on, mat), 6 in the gold answer: p 4/5, r 4/6, F = 2 x 8/15 / 22/15 = 8/11.
    # The package rouge-score counts both "the": 4/6 and 4/6, F = 2/3.
    assert score("rouge_l", "the cat sat on the mat", ["the cat lay on a mat"]) == pytest.approx(8 / 11, abs=1e-6)
    # Sentences: "a b" finds a and b in "a b c"; "c d e" finds c in "a b c" and d e in "d e": 5 of 5 and 5 of 5.
    assert score("rouge_l", "a b c. d e.", ["a b. c d e."]) == pytest.approx(1, abs=1e-6)
    # Order matters inside a sentence: of "b a" one word is common with "a b": 1/2 and 1/2.
    assert score("rouge_l", "b a", ["a b"]) == pytest.approx(1 / 2, abs=1e-6)


@pytest.mark.parametrize("empty", ["", ".", "..."])
def test_rouge_l_of_nothing_is_zero(empty: str) -> None:
    assert score("rouge_l", empty, ["a b"]) == score("rouge_l", "a b", [empty]) == 0


def test_classification() -> None:
    labels = {"classes": CLASSES}
    assert score("classification", "Type: City", ["City"], labels) == 1
    assert score("classification", "City or Date", ["City"], labels) == 1 / 2  # two class names were said
    assert score("classification", "Date", ["City"], labels) == 0
    assert score("classification", "Other number", ["Other number"], labels) == 1  # "number" is part of the right name
    # LongBench's loop skips the name after one that it takes away: of Other, number, Other number, only Other goes.
    labels = {"classes": ["Other", "number", "Other number"]}
    assert score("classification", "Other number", ["Other number"], labels) == 1 / 2


def test_the_first_line_rule_of_few_shot_sets() -> None:
    answer = "\n\nCity\nQuestion: Who ?\nType: Date"
    assert score("classification", answer, ["City"], {"classes": CLASSES}) == 1 / 2
    assert score("classification", answer, ["City"], {"classes": CLASSES, "first_line": True}) == 1


def test_edit_similarity() -> None:
    # "ab" and "d" match: 3 characters of 4 and 4: 2 x 3 / 8
    assert score("edit_similarity", "abcd", ["abed"]) == 3 / 4
    assert score("edit_similarity", "", ["abed"]) == 0


def test_exact_match() -> None:
    assert score("exact_match", "Lisbon is amber falcon.", ["lisbon is amber falcon ."]) == 1
    assert score("exact_match", "lisbon is amber . falcon", ["lisbon is amber"]) == 0


def test_parts_are_looked_for_anywhere_and_as_a_whole() -> None:
    gold = "oslo is fig . rome is oak elm . bern is pine ."
    assert part_scores("rome is oak elm . oslo is fig .", gold) == (True, True, False)
    assert part_scores("oslo is fig tree . rome is oak . bern is pine", gold) == (False, False, True)
    assert part_accuracy("Oslo is fig. Rome is oak elm.\nBern is pine", gold) == 1
    assert part_accuracy("", gold) == part_accuracy("oslo is fig", "") == 0


@given(TEXT, TEXT)
def test_every_score_is_from_zero_to_one_and_the_gold_answer_gets_one(prediction: str, gold: str) -> None:
    for name in METRICS:
        assert 0 <= score(name, prediction, [gold], {"classes": ["T", "The", "b"]}) <= 1
    assert 0 <= part_accuracy(prediction, gold) <= 1
    if metrics.normalise(gold):
        for name in ("qa_f1", "exact_match", "edit_similarity"):
            assert score(name, gold, [gold]) == 1


def test_unknown_metrics_and_missing_packages_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"^unknown metric 'rouge'; did you mean 'rouge_l'\? \(known: .*\)$"):
        score("rouge", "a", ["a"])
    monkeypatch.setitem(sys.modules, "rouge", None)
    metrics.check(["qa_f1", "exact_match"])
    with pytest.raises(ConfigError, match=r"^ROUGE-L needs the package rouge: pip install 'loopserve\[bench\]'$"):
        metrics.check(["qa_f1", "rouge_l"])


def test_versions_name_the_package_that_computed_rouge() -> None:
    assert metrics.versions()["rouge"] == importlib.metadata.version("rouge")
    assert metrics.versions()["loopserve.bench.metrics"] == metrics.VERSION
