"""A question stands where it is put, whole and once; borders are paragraphs, sentences or examples."""

from __future__ import annotations

import pytest

from loopserve.bench.tasks.longbench import place

PARAGRAPHS = "One is here. It is short.\n\nTwo is much longer than the first was, by far.\n\nThree."


def test_begin_and_end() -> None:
    assert place(PARAGRAPHS, "What?", "begin") == "What?\n\n" + PARAGRAPHS
    assert place(PARAGRAPHS, "What?", "end") == PARAGRAPHS + "\n\nWhat?"


def test_the_middle_is_the_paragraph_border_nearest_to_half() -> None:
    first, second, third = PARAGRAPHS.split("\n\n")
    assert place(PARAGRAPHS, "What?", "middle") == "\n\n".join([first, "What?", second, third])


def test_a_paragraph_is_preferred_to_a_line_unless_it_is_far_from_half() -> None:
    titled = "Passage 1:\nSarnow\nA port.\n\nPassage 2:\nTrebin\nA town in the hills."
    assert place(titled, "What?", "middle").split("\n\nWhat?\n\n")[1].startswith("Passage 2:")
    late = "First line of many words.\nSecond line of many words.\nThird line of many words.\n\nEnd."
    assert place(late, "What?", "middle").split("\n\nWhat?\n\n")[1].startswith("Third line")


def test_without_paragraphs_it_is_a_sentence_then_a_word() -> None:
    assert place("One two. Three four.", "What?", "middle") == "One two.\n\nWhat?\n\nThree four."
    assert place("one two three four", "What?", "middle") == "one two\n\nWhat?\n\nthree four"
    assert place("onetwo", "What?", "middle") == "one\n\nWhat?\n\ntwo"


def test_examples_are_not_split() -> None:
    examples = "Question: a ?\nType: City\nQuestion: b ?\nType: A date that takes very many words to say\nQuestion: c ?\nType: City"
    text = place(examples, "Say the type.", "middle", r"^Question:")
    before, after = text.split("\n\nSay the type.\n\n")
    assert before.endswith(("City", "say")) and after.startswith("Question:")


@pytest.mark.parametrize("position", ["begin", "middle", "end"])
def test_no_context_leaves_the_question(position: str) -> None:
    assert place("", "What?", position) == "What?"  # type: ignore[arg-type]
