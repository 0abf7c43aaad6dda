"""Score an answer against gold answers, from 0 to 1, with LongBench's metrics and exact match.

``score("qa_f1", prediction, answers)`` is the maximum over the gold answers, as in LongBench. ROUGE-L depends on the
package that computes it (two packages differ by 0.08 on one pair), so ``versions()`` is stored with every result. The
module depends on no model and no task.
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
    """Return LongBench's (SQuAD's) normal form: lower case, no ASCII punctuation, no articles, single spaces; in this order."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(prediction: str, gold: str) -> float:
    """Return 1 if both texts are equal after ``normalise``, else 0."""
    return float(normalise(prediction) == normalise(gold))


def qa_f1(prediction: str, gold: str) -> float:
    """Return F1 over the words that both texts share, with their counts."""
    ours, theirs = normalise(prediction).split(), normalise(gold).split()
    common = sum((Counter(ours) & Counter(theirs)).values())
    if not common:
        return 0.0
    precision, recall = common / len(ours), common / len(theirs)
    return 2 * precision * recall / (precision + recall)


def rouge_l(prediction: str, gold: str) -> float:
    """Return F of the package ``rouge``: sentences split at full stops, unions of longest common subsequences, words counted once."""
    try:
        scores = _rouge().get_scores([prediction], [gold])
    except (ValueError, RecursionError):  # nothing but full stops, or sentences of a thousand words: 0 in LongBench too
        return 0.0
    return float(scores[0]["rouge-l"]["f"])


def classification(prediction: str, gold: str, classes: Sequence[str]) -> float:
    """Return 1 / (number of class names in the prediction) if the right one is among them, else 0.

    A name that is part of the right one's name (``number`` of ``other number``) does not count against it.
    """
    found = [name for name in classes if name in prediction]
    at = 0
    while at < len(found):
        if found[at] in gold and found[at] != gold:
            del found[
                at
            ]  # The class that moves up to `at` is skipped, as in LongBench's loop, so that figures compare.
        at += 1
    return 1 / len(found) if gold in found else 0.0


def edit_similarity(prediction: str, gold: str) -> float:
    """Return ``difflib``'s ratio: twice the characters in matching blocks over the characters of both texts."""
    return SequenceMatcher(None, prediction, gold).ratio()


Metric = Callable[[str, str, Sequence[str]], float]
METRICS: Mapping[str, Metric] = {
    "exact_match": lambda prediction, gold, _: exact_match(prediction, gold),
    "qa_f1": lambda prediction, gold, _: qa_f1(prediction, gold),
    "rouge_l": lambda prediction, gold, _: rouge_l(prediction, gold),
    "classification": classification,
    "edit_similarity": lambda prediction, gold, _: edit_similarity(prediction, gold),
}
"""Metrics by name, each called with prediction, gold answer and class names."""


def score(metric: str, prediction: str, answers: Sequence[str], labels: Mapping[str, Any] | None = None) -> float:
    """Return the best score of the prediction over the gold answers.

    labels: the labels of a turn. ``classes`` lists the class names for ``classification``. ``first_line`` limits
    scoring to the first line of the answer, as LongBench does for few-shot sets, where models continue with examples.
    Raises ConfigError for an unknown metric.
    """
    check([metric])
    labels = labels or {}
    if labels.get("first_line"):
        prediction = prediction.lstrip("\n").split("\n")[0]
    return max((METRICS[metric](prediction, gold, labels.get("classes", ())) for gold in answers), default=0.0)


def part_scores(prediction: str, gold: str) -> tuple[bool, ...]:
    """Return for each sentence of the gold answer, in order, whether the prediction contains it at any position.

    The position is ignored so that one additional or missing place does not fail all later parts.
    """
    predicted = {normalise(part) for part in _sentences(prediction)}
    return tuple(normalise(part) in predicted for part in _sentences(gold))


def part_accuracy(prediction: str, gold: str) -> float:
    """Return the share of the gold answer's sentences that the prediction contains."""
    right = part_scores(prediction, gold)
    return sum(right) / len(right) if right else 0.0


def check(metrics: Iterable[str]) -> None:
    """Raise ConfigError for a metric that is unknown or whose package is missing, before anything is computed."""
    for metric in metrics:
        if metric not in METRICS:
            raise ConfigError(f"unknown metric {metric!r}{did_you_mean(metric, METRICS)}")
        if metric == "rouge_l":
            _rouge()


def versions() -> dict[str, str | None]:
    """Return the versions of the scoring packages, None for one that is not installed. difflib is Python's own."""
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
