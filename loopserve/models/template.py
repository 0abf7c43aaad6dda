"""Render a conversation with a chat template, and find the places of people's texts and of answers in the rendering.

The template gets the real contents. A second rendering contains marks: characters that occur nowhere else, within people's texts
(where a special token could begin) and around answers. It is used only if it equals the first rendering apart from its marks, so a
template may read and change contents freely.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from loopserve.core.errors import InputError

# Letters of a script without case, blanks or compositions: no template and no normalizer changes them.
_MARKS = [chr(code) for code in range(0xA100, 0xA400)]


@dataclass(frozen=True)
class View:
    """Hold a rendering with its marks. ``answers`` gives begin and end of each answer, by index of its message."""

    text: str
    mark: str
    answers: Mapping[int, tuple[int, int]]

    def clean(self, start: int = 0, end: int | None = None) -> str:
        """Return a part of the rendering without marks."""
        return self.text[start:end].replace(self.mark, "")

    def at(self, length: int) -> int:
        """Return the end of the first ``length`` characters of the clean rendering."""
        return length + bisect_left(self._marked, length)

    @cached_property
    def _marked(self) -> list[int]:
        """Return the places of the marks in the clean rendering."""
        return [match.start() - number for number, match in enumerate(re.finditer(self.mark, self.text))]


def view(
    render: Callable[[Sequence[str]], str],
    contents: Sequence[str],
    wrapped: Iterable[int],
    typed: Callable[[str], list[int]],
    firsts: frozenset[str],
) -> View:
    """Render a conversation and find its parts.

    render: the template, from contents to text. contents: by message. wrapped: indices of the messages whose place is needed.
    typed: offsets of special tokens in a text. firsts: the characters with which special tokens begin. Raises InputError if a
    special token that somebody typed cannot be distinguished from the template's.
    """
    real = render(contents)
    people, *signs = _free([real, *contents])
    wanted = [number for number in wrapped if contents[number].strip()]
    anywhere = any(first in content for first in firsts for content in contents)
    spots = {number: at for number, content in enumerate(contents) if anywhere and (at := typed(content))}
    for numbers in [wanted, []] if wanted else [[]]:
        for every in [True, False] if anywhere else [False]:
            if not (numbers or every or spots):
                break
            marked = [
                _wrapped(
                    _marked(content, spots.get(number, []), firsts if every else frozenset(), people), number, signs
                )
                if number in numbers
                else _marked(content, spots.get(number, []), firsts if every else frozenset(), people)
                for number, content in enumerate(contents)
            ]
            found = _parts(render(marked), people, signs)
            if found.clean() == real:
                return found
    if spots:
        raise InputError(
            "a message contains the text of a special token, which the model's chat template reads or changes: it cannot be "
            "kept as text; remove it"
        )
    return View(real, people, {})


def _free(texts: Sequence[str]) -> list[str]:
    used = set().union(*map(set, texts))
    found = [mark for mark in _MARKS if mark not in used][:5]
    if len(found) < 5:
        raise InputError("the conversation uses every character from U+A100 to U+A3FF; remove some of them")
    return found


def _marked(content: str, spots: Sequence[int], firsts: frozenset[str], mark: str) -> str:
    inside = set(spots) | {at for at, character in enumerate(content) if character in firsts}
    if not inside:
        return content
    return "".join(character + mark if at in inside else character for at, character in enumerate(content))


def _wrapped(content: str, number: int, signs: Sequence[str]) -> str:
    """Put signs with the message's index around a content, inside its outer white space."""
    core = content.strip()
    start = content.index(core)
    begin, end = f"{signs[0]}{number}{signs[1]}", f"{signs[2]}{number}{signs[3]}"
    return content[:start] + begin + core + end + content[start + len(core) :]


def _parts(marked: str, people: str, signs: Sequence[str]) -> View:
    marked = marked.replace(_escaped(people), people)
    begin, between, end, last = ("(?:" + sign + "|" + re.escape(_escaped(sign)) + ")" for sign in signs)
    pattern = re.compile(f"{begin}(?P<begin>\\d+){between}|{end}(?P<end>\\d+){last}")
    text, at = "", 0
    begins: dict[int, int] = {}
    answers: dict[int, tuple[int, int]] = {}
    for match in pattern.finditer(marked):
        text += marked[at : match.start()]
        at = match.end()
        if match["begin"]:
            begins[int(match["begin"])] = len(text)
        elif int(match["end"]) in begins:
            answers[int(match["end"])] = (begins[int(match["end"])], len(text))
    return View(text + marked[at:], people, answers)


def _escaped(character: str) -> str:
    return f"\\u{ord(character):04x}"


def text_parts(content: object) -> Iterator[str]:
    """Return the texts of a content given in parts, as in the chat API. Raises InputError for parts that are not text."""
    if not isinstance(content, list):
        raise InputError(f"a content is text, or a list of parts of type text, not {type(content).__name__}")
    for part in content:
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise InputError(f"a content has a part of type {kind!r}; known is text")
        yield part["text"]
