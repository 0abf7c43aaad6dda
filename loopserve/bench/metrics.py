"""Scores of an answer against gold answers, each from 0 to 1: LongBench's own metrics and exact match. Knows no model and no task.

``score("qa_f1", prediction, answers)`` is the best score over the gold answers, as in LongBench. ROUGE-L depends on the package that
computes it (two packages differ by 0.08 on one pair), so ``versions()`` goes into every result.
"""

from __future__ import annotations

import platform
import re
import string
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import SequenceMatcher
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from loopserve.core.errors import ConfigError, did_you_mean

VERSION = "1"
"""Changes whenever a metric gives another score for the same answer."""

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise(text: str) -> str:
    """LongBench's normal form (SQuAD's): lower case, no ASCII punctuation, no articles, single spaces; in this order."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(prediction: str, gold: str) -> float:
    """1 if both are the same after ``normalise``."""
    return float(normalise(prediction) == normalise(gold))


def qa_f1(prediction: str, gold: str) -> float:
    """F1 over the words that both have in common, with their counts."""
    ours, theirs = normalise(prediction).split(), normalise(gold).split()
    common = sum((Counter(ours) & Counter(theirs)).values())
    if not common:
        return 0.0
    precision, recall = common / len(ours), common / len(theirs)
    return 2 * precision * recall / (precision + recall)


def rouge_l(prediction: str, gold: str) -> float:
    """F of the package ``rouge``: sentences split at full stops, unions of longest common subsequences, each word counted once."""
    try:
        scores = _rouge().get_scores([prediction], [gold])
    except (ValueError, RecursionError):  # nothing but full stops, or sentences of a thousand words: 0 in LongBench too
        return 0.0
    return float(scores[0]["rouge-l"]["f"])


def classification(prediction: str, gold: str, classes: Sequence[str]) -> float:
    """1 / (number of class names in the prediction) if the right one is among them.

    A name that is part of the right one's name (``number`` of ``other number``) does not count against it.
    """
    found = [name for name in classes if name in prediction]
    at = 0
    while at < len(found):
        if found[at] in gold and found[at] != gold:
            del found[at]  # and the class that moves up to `at` is not looked at: LongBench's loop, so figures compare
        at += 1
    return 1 / len(found) if gold in found else 0.0


def edit_similarity(prediction: str, gold: str) -> float:
    """``difflib``'s ratio: twice the characters in matching blocks over the characters of both."""
    return SequenceMatcher(None, prediction, gold).ratio()


Metric = Callable[[str, str, Sequence[str]], float]
METRICS: Mapping[str, Metric] = {
    "exact_match": lambda prediction, gold, _: exact_match(prediction, gold),
    "qa_f1": lambda prediction, gold, _: qa_f1(prediction, gold),
    "rouge_l": lambda prediction, gold, _: rouge_l(prediction, gold),
    "classification": classification,
    "edit_similarity": lambda prediction, gold, _: edit_similarity(prediction, gold),
}
"""By name, each called with prediction, gold answer and class names; ``score`` does so for several gold answers."""


def score(metric: str, prediction: str, answers: Sequence[str], labels: Mapping[str, Any] | None = None) -> float:
    """The best score of the prediction over the gold answers.

    labels: a turn's. ``classes`` names the classes of ``classification``; ``first_line`` says that only the answer's first line
    counts, as LongBench has it for few-shot sets, where models go on with examples of their own. ConfigError for an unknown metric.
    """
    check([metric])
    labels = labels or {}
    if labels.get("first_line"):
        prediction = prediction.lstrip("\n").split("\n")[0]
    return max((METRICS[metric](prediction, gold, labels.get("classes", ())) for gold in answers), default=0.0)


def part_scores(prediction: str, gold: str) -> tuple[bool, ...]:
    """For each sentence of the gold answer, in its order, whether the prediction has that sentence (anywhere).

    Anywhere, because a place named too much or too little must not make all later parts wrong.
    """
    said = {normalise(part) for part in _sentences(prediction)}
    return tuple(normalise(part) in said for part in _sentences(gold))


def part_accuracy(prediction: str, gold: str) -> float:
    """Share of the gold answer's sentences that the prediction has."""
    right = part_scores(prediction, gold)
    return sum(right) / len(right) if right else 0.0


def check(metrics: Iterable[str]) -> None:
    """ConfigError, one line, for a metric that is unknown or whose package is missing: before anything is computed."""
    for metric in metrics:
        if metric not in METRICS:
            raise ConfigError(f"unknown metric {metric!r}{did_you_mean(metric, METRICS)}")
        if metric == "rouge_l":
            _rouge()


def versions() -> dict[str, str | None]:
    """What the scores were computed with; None for a package that is not installed. difflib is Python's own."""
    try:
        rouge: str | None = version("rouge")
    except PackageNotFoundError:
        rouge = None
    return {"loopserve.bench.metrics": VERSION, "rouge": rouge, "difflib": f"python {platform.python_version()}"}


def _rouge() -> Any:
    try:
        return import_module("rouge").Rouge(metrics=["rouge-l"])
    except ImportError as error:
        raise ConfigError("ROUGE-L needs the package rouge: pip install 'loopserve[bench]'") from error


def _sentences(text: str) -> list[str]:
    return [part for part in re.split(r"[.\n]", text) if part.strip()]
