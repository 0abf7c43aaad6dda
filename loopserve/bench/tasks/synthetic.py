"""Make samples from recall dialogues: no download, any length, for the bundled model and for others.

Every case (a length, a position, a number of keys, ...) draws its dialogues from the same held-out seeds, and cases
alternate, so a limit cuts all of them equally. The bundled model answers the plain form; ``labels["trained"]`` marks
dialogues of the kind that its training drew. Other models need ``form: instructed``, which adds the answer's format to
the question.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal, TypeVar

from pydantic import Field, model_validator

from loopserve.bench.recall import HELD_OUT_SEED, LIST_ALL, MARKERS_PER_TURN, RecallTask, Turn, make_dialogue
from loopserve.bench.samples import POSITIONS, AskedTurn, OneOrMore, Places, Position, Sample, TaskOptions, several
from loopserve.bench.vocabulary import PLACES
from loopserve.core.stack.config import mistake

VERSION = "2"
SEEDS = 1_000_000  # dialogues of one seed; the next seed's begin after them
LONG_ANSWER = 128  # words

_FORM = "Answer with one sentence for each place and nothing else, in this form: <place> is <code>."
_KEPT = "If the code is kept in another place, say so and go on with that place: <place> is kept in <place>. <place> is <code>."
_LISTED = "The new codes are those stated in this message; answer in the order stated, in this form: <place> is <code>."


class RecallOptions(TaskOptions):
    """One key: a place is named, its code is the answer. Also the fields of the other synthetic tasks."""

    tokens: OneOrMore = Field(2048, description="Length of the whole dialogue in words (the bundled model's tokens).")
    turns: int = Field(3, ge=1, description="Questions of a dialogue, one a turn.")
    position: Places = Field(POSITIONS, description="Where the question stands in its turn's text.")
    keys: OneOrMore = Field(1, description="Places that a question asks for.")
    distance: OneOrMore | None = Field(
        None, description="How many turns back the asked facts were stated; drawn for every place by default."
    )
    dialogues: int = Field(24, ge=1, description="Dialogues of each case.")
    code_words: tuple[int, int] = Field((1, 4), description="Fewest and most words of a code.")
    fact_share: float = Field(0.4, gt=0, lt=1, description="Share of the words in facts; less where places run out.")
    form: Literal["plain", "instructed"] = Field("plain", description="instructed: the question says how to answer.")

    @model_validator(mode="after")
    def _possible(self) -> RecallOptions:
        for case in cases(self):
            try:
                case.recall_task(self, "mixed")
            except ValueError as error:
                raise mistake(str(error)) from error
            if case.tokens < (least := case.least_words(self)):
                raise mistake(
                    f"tokens {case.tokens} cannot hold {self.turns} turns of this kind: give at least {least}"
                )
        return self


class MultiKeyOptions(RecallOptions):
    """Several keys: each part of the answer needs another place of the context."""

    keys: OneOrMore = Field((2, 3, 5), description="Places that a question asks for.")


class ChainOptions(RecallOptions):
    """A code is kept in another place, and that one's perhaps in a third: the next key appears only in the answer."""

    chain: OneOrMore = Field((2, 3), description="Facts that lead to a code; 1 is a plain code.")


class ListAllOptions(RecallOptions):
    """Each turn asks for every fact that it states, in order: it states nothing else, and the answer is spread over the turn.

    The bundled model was not trained on it; it answers where the places are named.
    """

    named: bool = Field(True, description="The question names the places; if not, it asks for all new codes.")
    keys: OneOrMore = Field((4, 8), description="Facts stated and listed in every turn.")


class LongAnswerOptions(RecallOptions):
    """Answers of at least 128 words: many keys with long codes. The bundled model was trained on up to five keys."""

    keys: OneOrMore = Field(19, description="Places that a question asks for.")
    code_words: tuple[int, int] = Field((4, 4), description="Fewest and most words of a code.")

    @model_validator(mode="after")
    def _long(self) -> LongAnswerOptions:
        words = min(several(self.keys)) * (3 + self.code_words[0])
        if words < LONG_ANSWER:
            raise mistake(
                f"answers of {words} words are no long answers: keys x (3 + code_words) must reach {LONG_ANSWER}"
            )
        return self


Options = TypeVar("Options", bound=RecallOptions)


@dataclass(frozen=True)
class Case:
    """Hold one combination of the options that list several values, except the position."""

    tokens: int
    keys: int
    chain: int
    distance: int | None

    def recall_task(self, options: RecallOptions, position: Literal["begin", "middle", "end", "mixed"]) -> RecallTask:
        return RecallTask(
            tokens=self.tokens,
            turns=options.turns,
            keys=self.keys,
            position=position,
            chain=self.chain,
            fact_share=min(options.fact_share, self._most_facts(options)),
            code_words=options.code_words,
            distance=self.distance,
            list_all="no" if not isinstance(options, ListAllOptions) else "named" if options.named else "unnamed",
        )

    def _most_facts(self, options: RecallOptions) -> float:
        """Return the share of the words that facts can take if no place repeats: beyond some 8,000 words, places are scarce."""
        spare = len(PLACES) - options.turns * self.keys * self.chain
        return 0.9 * spare * (6 + sum(options.code_words) / 2) / self.tokens

    def least_words(self, options: RecallOptions) -> int:
        """Return the words of a dialogue that states the facts it asks for and nothing else."""
        code = options.code_words[1]
        facts = self.keys * (6 + code + (self.chain - 1) * 9)
        answer = self.keys * (3 + code + (self.chain - 1) * 6)
        question = max(len(LIST_ALL), 5 + 2 * self.keys)
        return 1 + options.turns * (MARKERS_PER_TURN + facts + answer + question)

    def trained(self, options: RecallOptions) -> bool:
        """Return whether the training of the bundled model drew such dialogues (research/training/curriculum.py, last stage)."""
        return (
            options.form == "plain"
            and not isinstance(options, ListAllOptions)
            and 384 <= self.tokens <= 3072
            and options.turns <= 14
            and self.keys <= 5
            and self.chain <= 3
            and 1 <= options.code_words[0] <= options.code_words[1] <= 4
            and 0.12 <= options.fact_share <= 0.55
        )

    def label(self, position: Position) -> str:
        chain = f"-chain{self.chain}" if self.chain > 1 else ""
        distance = "" if self.distance is None else f"-distance{self.distance}"
        return f"{self.tokens}-{position}-keys{self.keys}{chain}{distance}"


def cases(options: RecallOptions) -> list[Case]:
    """Return every combination, the last option changing fastest."""
    chains = several(options.chain) if isinstance(options, ChainOptions) else (1,)
    distances = (None,) if options.distance is None else several(options.distance)
    return [Case(*each) for each in product(several(options.tokens), several(options.keys), chains, distances)]


class SyntheticTask:
    """Make benchmark samples of recall dialogues."""

    version = VERSION

    def __init__(self, kind: str, options: RecallOptions) -> None:
        self.name = options.name or kind
        self.options = options

    def samples(self, limit: int | None, seed: int) -> Iterator[Sample]:
        """Yield samples case by case in turn: the first dialogue of all cases, then the second."""
        everything = product(range(self.options.dialogues), cases(self.options), several(self.options.position))
        for count, (index, case, position) in enumerate(everything):
            if limit is not None and count >= limit:
                return
            yield self._sample(case, position, index, HELD_OUT_SEED + seed * SEEDS + index)

    def _sample(self, case: Case, position: Position, index: int, seed: int) -> Sample:
        dialogue = make_dialogue(case.recall_task(self.options, position), seed)
        turns = tuple(self._turn(turn, case) for turn in dialogue.turns)
        return Sample(f"{case.label(position)}-{index:04d}", self.name, turns)

    def _turn(self, turn: Turn, case: Case) -> AskedTurn:
        words, text, question = len(turn.answer.split()), turn.text, turn.question
        max_new_tokens = words + 16
        if self.options.form == "instructed":
            listed = isinstance(self.options, ListAllOptions) and not self.options.named
            how = _LISTED if listed else f"{_FORM} {_KEPT}" if case.chain > 1 else _FORM
            question = f"{turn.question} {how}"
            text = turn.text.replace(turn.question, question, 1)
            max_new_tokens = 3 * words + 32  # other tokenizers make several tokens of a word
        labels: dict[str, Any] = {
            "tokens": case.tokens,
            "keys": len(turn.keys),
            "chain": case.chain,
            "places": list(turn.keys),
            "distances": list(turn.distances),
            "distance": max(turn.distances),
            "parts": turn.answer.split().count("."),
            "trained": case.trained(self.options),
        }
        return AskedTurn(text, question, (turn.answer,), turn.position, "exact_match", max_new_tokens, labels)
