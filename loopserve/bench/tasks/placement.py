"""Puts a question before, into or after a context, and nothing of it anywhere else."""

from __future__ import annotations

import re

from loopserve.bench.samples import Position

_PARAGRAPH = re.compile(r"\n\s*\n|\n")
_SENTENCE = re.compile(r"(?<=[.!?])\s+")
_WORD = re.compile(r"\s+")


def place(context: str, question: str, position: Position, boundary: str | None = None) -> str:
    """The turn's text. In the middle, the question stands at the border nearest to half of the context.

    boundary: a pattern; borders are where it matches (before an example of a few-shot context). Else borders are between paragraphs
    or, in a text without them, between sentences, then words. An empty context gives the question alone.
    """
    if not context:
        return question
    if position == "begin":
        return f"{question}\n\n{context}"
    if position == "end":
        return f"{context}\n\n{question}"
    at = _middle(context, boundary)
    return f"{context[:at].rstrip()}\n\n{question}\n\n{context[at:].lstrip()}"


def _middle(context: str, boundary: str | None) -> int:
    """Index of the border nearest to half, never at an end unless there is no border inside."""
    patterns = [re.compile(boundary, re.MULTILINE)] if boundary else [_PARAGRAPH, _SENTENCE, _WORD]
    for pattern in patterns:
        borders = [match.start() for match in pattern.finditer(context) if 0 < match.start() < len(context)]
        if borders:
            return min(borders, key=lambda at: abs(2 * at - len(context)))
    return len(context) // 2
