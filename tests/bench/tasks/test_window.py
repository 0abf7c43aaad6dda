"""Contexts are cut in the middle, questions never, and what was cut is counted."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loopserve.bench.samples import AskedTurn, Position, Sample
from loopserve.bench.tasks import fit
from loopserve.core.errors import InputError

POSITIONS: tuple[Position, ...] = ("begin", "middle", "end")


class Words:
    """A tokenizer of words."""

    def __init__(self) -> None:
        self.known: list[str] = []

    def encode(self, text: str) -> list[int]:
        for word in text.split():
            if word not in self.known:
                self.known.append(word)
        return [self.known.index(word) for word in text.split()]

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(self.known[number] for number in ids)


def turn(words: int, position: Position, name: str = "w", answer: str = "yes", room: int = 3) -> AskedTurn:
    context = [f"{name}{number}" for number in range(words)]
    at = {"begin": 0, "middle": words // 2, "end": words}[position]
    text = "\n\n".join(part for part in (" ".join(context[:at]), "what is it ?", " ".join(context[at:])) if part)
    return AskedTurn(text, "what is it ?", (answer,), position, "qa_f1", room, {"keys": 1})


def length(sample: Sample, words: Words) -> int:
    """What the fit counts, with no room for a template."""
    answers = [max(each.max_new_tokens, len(words.encode(each.answers[0]))) for each in sample.turns]
    return sum(len(words.encode(each.text)) for each in sample.turns) + sum(answers)


def cut(sample: Sample, limit: int) -> tuple[Sample, int, Words]:
    words = Words()
    fitted, count = fit(sample, words.encode, words.decode, limit, template_tokens=0)
    return fitted, count, words


def test_what_fits_is_left_alone() -> None:
    sample = Sample("s", "t", (turn(10, "end"), turn(10, "begin")))
    assert cut(sample, 34)[:2] == (sample, 0)  # twice 10 words, a question of 4 and 3 tokens of answer


@pytest.mark.parametrize("position", POSITIONS)
def test_the_middle_of_the_context_goes_and_the_question_stays(position: Position) -> None:
    fitted, count, _ = cut(Sample("s", "t", (turn(100, position),)), 27)
    [only] = fitted.turns
    context = only.text.replace("what is it ?", "").split()
    assert count == 80 and len(context) == 20 and only.labels == {"keys": 1, "truncated": 80}
    assert context[0] == "w0" and context[-1] == "w99"
    before, after = only.text.split(only.question)
    if position == "begin":
        assert not before and context == [f"w{n}" for n in (*range(10), *range(90, 100))]
    if position == "end":
        assert not after and context == [f"w{n}" for n in (*range(10), *range(90, 100))]
    if position == "middle":  # each side loses its own middle
        assert before.split() == [f"w{n}" for n in (*range(5), *range(45, 50))]
        assert after.split() == [f"w{n}" for n in (*range(50, 55), *range(95, 100))]


def test_the_longest_contexts_are_cut_first() -> None:
    sample = Sample("s", "t", (turn(10, "end", "a"), turn(200, "end", "b"), turn(100, "begin", "c")))
    fitted, count, words = cut(sample, 10 + 50 + 50 + 3 * 7)
    assert fitted.turns[0] == sample.turns[0]
    assert [len(words.encode(each.text)) - 4 for each in fitted.turns] == [10, 50, 50] and count == 200


def test_a_turn_without_a_question_is_cut_too() -> None:
    only = AskedTurn(" ".join(f"w{n}" for n in range(50)), "", (), None, "qa_f1", 1)
    fitted, count, _ = cut(Sample("s", "t", (only,)), 11)
    assert fitted.turns[0].text.split() == [f"w{n}" for n in (*range(5), *range(45, 50))] and count == 40


def test_gold_answers_longer_than_the_room_for_outputs_are_counted() -> None:
    sample = Sample("s", "t", (turn(10, "end", answer="a b c d e f g h"),))
    assert cut(sample, 22)[1] == 0 and cut(sample, 21)[1] == 1


def test_questions_that_do_not_fit_are_an_error_of_one_line() -> None:
    with pytest.raises(InputError, match=r"^questions and answers alone need 7 tokens, the window has 6$"):
        cut(Sample("s", "t", (turn(10, "end"),)), 6)


def test_a_tokenizer_whose_pieces_join_differently_still_fits() -> None:
    """Two characters a token: cutting shifts the borders, so the text between them counts anew."""

    def encode(text: str) -> list[int]:
        return [ord(text[at]) * 65536 + ord(text[at + 1 : at + 2] or "\0") for at in range(0, len(text), 2)]

    def decode(ids: Sequence[int]) -> str:
        return "".join(chr(each // 65536) + chr(each % 65536).strip("\0") for each in ids)

    sample = Sample("s", "t", (turn(100, "middle"), turn(61, "begin")))
    for limit in range(60, 120, 7):
        fitted, _ = fit(sample, encode, decode, limit, template_tokens=0)
        assert sum(len(encode(each.text)) + 3 for each in fitted.turns) <= limit


@given(st.lists(st.tuples(st.integers(1, 60), st.sampled_from(POSITIONS)), min_size=1, max_size=4), st.integers(0, 200))
def test_every_dialogue_fits_and_nothing_more_is_cut_than_counted(
    shape: list[tuple[int, Position]], spare: int
) -> None:
    sample = Sample("s", "t", tuple(turn(words, position, f"{n}-") for n, (words, position) in enumerate(shape)))
    limit = 7 * len(shape) + spare
    fitted, count, words = cut(sample, limit)
    assert length(fitted, words) == length(sample, words) - count <= limit
    assert (count == 0) == (length(sample, words) <= limit)
    assert count == sum(each.labels.get("truncated", 0) for each in fitted.turns)
    assert all(each.question in each.text for each in fitted.turns)
    assert length(fitted, words) > limit - len(shape) or count == 0  # no more than rounding is given away
