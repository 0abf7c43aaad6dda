"""Define the twelve English LongBench sets that are recombined: request, metric and answer length.

Metrics, answer lengths and the first-line rule are LongBench's. The wording is ours, because LongBench's prompts put an
instruction before and after the context, and a question at the begin must not be restated at the end.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from loopserve.bench.samples import Position

Kind = Literal["question answering", "summarisation", "few-shot"]
WHERE: Mapping[Position, str] = {"begin": "that follows", "middle": "that stands around this request", "end": "above"}
EARLIER = "in my message number {number}"
_CUE = re.compile(r"\s*(Type|Answer|Summary):\s*$")
_BRIEF = "Give the answer only, as briefly as you can."


@dataclass(frozen=True)
class LongBenchSet:
    """Hold one set. ``request`` is the turn's request; {where} names the context's place, {input} the item's own question."""

    name: str
    kind: Kind
    context: str
    """What the context is, for a turn that only tells it."""
    request: str
    metric: str
    max_new_tokens: int
    example: str | None = None
    """Pattern at which an example of a few-shot context begins; a question never splits an example."""

    @property
    def first_line(self) -> bool:
        """Return whether only the first line is scored: in few-shot sets models continue with examples of their own."""
        return self.kind == "few-shot"

    def question(self, asked: str, where: str) -> str:
        """Return the request with an item's question, without a cue at its end (``Answer:``), since the context may follow it."""
        return self.request.format(where=where, input=_CUE.sub("", asked)).strip()


def _answer(name: str, context: str, tokens: int, extra: str = "") -> LongBenchSet:
    request = f"Answer a question about the {context} {{where}}. {_BRIEF}{extra}\nQuestion: {{input}}"
    return LongBenchSet(name, "question answering", context, request, "qa_f1", tokens)


def _summary(name: str, context: str, request: str) -> LongBenchSet:
    return LongBenchSet(name, "summarisation", context, request, "rouge_l", 512)


_YES_NO = " Answer a yes-or-no question with yes or no, and say unanswerable if the article does not answer it."

SETS: Mapping[str, LongBenchSet] = {
    each.name: each
    for each in (
        _answer("narrativeqa", "story", 128),
        _answer("qasper", "article", 128, _YES_NO),
        _answer("multifieldqa_en", "text", 64),
        _answer("hotpotqa", "collection of passages", 32),
        _answer("2wikimqa", "collection of passages", 32),
        _answer("musique", "collection of passages", 32),
        _summary("gov_report", "government report", "Write a summary of the government report {where}, one page long."),
        _summary(
            "qmsum",
            "meeting transcript",
            "Answer a question about the meeting transcript {where}, in one or a few sentences.\nQuestion: {input}",
        ),
        _summary("multi_news", "news collection", "Write a summary of the news collection {where}, one page long."),
        LongBenchSet(
            "trec",
            "few-shot",
            "list of classified questions",
            "Say of which type a question is, as in the list of classified questions {where}. Give the type only.\n{input}",
            "classification",
            64,
            r"^Question:",
        ),
        LongBenchSet(
            "samsum",
            "few-shot",
            "list of summarised dialogues",
            "Summarise a dialogue, as in the list of summarised dialogues {where}.\n{input}",
            "rouge_l",
            128,
            r"^Dialogue:",
        ),
        LongBenchSet(
            "triviaqa",
            "few-shot",
            "list of passages with questions and answers",
            "Answer the question about a passage, as in the list of passages with questions and answers {where}. "
            "Give the answer only.\n{input}",
            "qa_f1",
            32,
            r"^Passage:",
        ),
    )
}
