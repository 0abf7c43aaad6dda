"""Place a question before, inside or after a context, without repeating any part of it."""

from __future__ import annotations

import re

from loopserve.bench.samples import Position

_NEAR = 0.2  # maximum distance of a border from half of the context, as a share, before smaller parts are tried
_PARAGRAPH = re.compile(r"\n\s*\n")
_LINE = re.compile(r"\n")
_SENTENCE = re.compile(r"(?<=[.!?])\s+")
_WORD = re.compile(r"\s+")


def place(context: str, question: str, position: Position, boundary: str | None = None) -> str:
    """Return the turn's text. In the middle, the question is at the border nearest to half of the context.

    boundary: a pattern; borders are at its matches (before an example of a few-shot context). Otherwise borders are
    between paragraphs or, where none is within a fifth of the context from half, between lines, sentences, words. An
    empty context gives the question alone.
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
    """Return the index of the border to use, never at an end unless there is no border inside."""
    patterns = [re.compile(boundary, re.MULTILINE)] if boundary else [_PARAGRAPH, _LINE, _SENTENCE, _WORD]
    nearest: list[int] = []
    for pattern in patterns:
        borders = [match.start() for match in pattern.finditer(context) if 0 < match.start() < len(context)]
        nearest += [min(borders, key=lambda at: abs(2 * at - len(context)))] if borders else []
        if nearest and abs(2 * nearest[-1] - len(context)) <= 2 * _NEAR * len(context):
            break
    return nearest[-1] if nearest else len(context) // 2
