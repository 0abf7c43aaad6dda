"""A benchmark of a moment: a tiny random model with the bundled tokenizer, and a task whose answers are known in advance."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from random import Random
from typing import Any

from loopserve.api import Engine, load_stack
from loopserve.bench.quality.records import Record
from loopserve.bench.quality.runner import Examiner, Settings
from loopserve.bench.quality.suite import contestants
from loopserve.bench.samples import AskedTurn, BrokenSample, Sample, Task
from loopserve.bench.vocabulary import CODE_WORDS, PLACES
from loopserve.models.loading import load
from loopserve.models.random import random_llama

WINDOW = 512
SNAPKV: dict[str, Any] = {
    "name": "snapkv",
    "prefill": {"policy": "dense"},
    "decode": {"policy": "snapkv", "budget": 40, "window": 8},
}
BAD_LAYER: dict[str, Any] = {
    "name": "bad-layer",
    "prefill": {"policy": "dense"},
    "decode": {"policy": "full"},
    "layers": [{"at": [7], "decode": {"policy": "snapkv"}}],
}


@cache
def random_model() -> tuple[Any, Any]:
    """A random model of two layers, and the bundled tokenizer."""
    tokenizer = load("demo")[1]
    shape = {"layers": 2, "hidden": 32, "heads": 2, "kv_heads": 1, "intermediate": 48}
    return random_llama(**shape, vocabulary=len(tokenizer), positions=WINDOW), tokenizer


@dataclass
class Words:
    """Dialogues of random words; the answer repeats some. One row is broken, one is longer than the window, as its fields say."""

    name: str = "words"
    version: str = "1"
    dialogues: int = 3
    turns: int = 2
    words: int = 60
    broken: Sequence[int] = ()
    too_long: Sequence[int] = ()
    unanswered: Sequence[int] = ()
    metric: str = "qa_f1"
    labels: dict[str, Any] = field(default_factory=dict)

    def samples(self, limit: int | None, seed: int) -> Iterator[Sample | BrokenSample]:
        for number in range(self.dialogues if limit is None else min(limit, self.dialogues)):
            if number in self.broken:
                yield BrokenSample(str(number), self.name, "the row has no 'question'")
            else:
                draw = Random(seed * 1000 + number)
                yield Sample(
                    str(number), self.name, tuple(self._turn(draw, number, turn) for turn in range(self.turns))
                )

    def _turn(self, draw: Random, number: int, turn: int) -> AskedTurn:
        count = 2 * WINDOW if number in self.too_long else self.words
        said = draw.choices(CODE_WORDS, k=count)
        question = f"what is the code of {draw.choice(PLACES)} ?"
        position = ("begin", "middle", "end")[number % 3]
        at = {"begin": 0, "middle": count // 2, "end": count}[position]
        text = " ".join([*said[:at], question, *said[at:]])
        answers = () if turn in self.unanswered else (" ".join(draw.sample(said, 4)),)
        return AskedTurn(text, question, answers, position, self.metric, 6, {"words": count, **self.labels})  # type: ignore[arg-type]


def ask(
    *tasks: Task, stacks: Sequence[Any] = (SNAPKV,), shares: Sequence[float] = (), model: Any = None, **settings: Any
) -> list[Record]:
    """All records of a small run under the random model, or another pair of model and tokenizer."""
    engine = Engine(*(model or random_model()), "dense")
    lineup = contestants([load_stack(each) for each in stacks], shares)
    return [record for records in Examiner(engine, lineup, Settings(**settings)).run(tasks) for record in records]
