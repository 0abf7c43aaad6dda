"""Separate the answer of a model from its reasoning and its channels, in its tokens and as they arrive. Depends on no template."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

# Blocks that contain reasoning. They begin an answer, or the template has opened them already.
REASONING_BLOCKS = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
)
CHANNEL, MESSAGE = "<|channel|>", "<|message|>"  # the harmony format
_FRAME = ("<|START_RESPONSE|>", "<|END_RESPONSE|>")  # mark the answer itself


@dataclass(frozen=True)
class Answer:
    """Hold one answer: its text, its reasoning (None: no such block), and the complete output of the model.

    tokens: those of the answer, without the token that ended it. raw: their text, special tokens included.
    """

    text: str
    reasoning: str | None
    raw: str
    tokens: tuple[int, ...]


Piece = tuple[bool, str]  # (a special token, its text), or (False, plain text)


def split_answer(pieces: Sequence[Piece], opened: str = "", *, over: bool = True) -> tuple[str, str | None]:
    """Return (text, reasoning) of an answer. opened: the prompt's text before the answer. over: the answer is complete."""
    if any(special and text == CHANNEL for special, text in pieces):
        return _channels(pieces)
    whole = "".join(text for special, text in pieces if not (special and text in _FRAME))
    for begin, end in REASONING_BLOCKS:
        before = opened.rstrip().endswith(begin)
        if before or whole.lstrip().startswith(begin):
            inside = whole if before else whole.lstrip()[len(begin) :]
            reasoning, found, text = inside.partition(end)
            if not over and not found:  # the end of the block may be beginning
                held = next((n for n in range(min(len(end) - 1, len(inside)), 0, -1) if end.startswith(inside[-n:])), 0)
                reasoning = inside[: len(inside) - held]
            return text.lstrip(), reasoning.strip()
        if not over and whole.strip() and begin.startswith(whole.strip()):
            return "", None  # a block may be beginning; the rest has not arrived yet
    return whole, None


def _channels(pieces: Sequence[Piece]) -> tuple[str, str | None]:
    """Parse the harmony format: the channel ``final`` is the answer, all other channels are reasoning."""
    spoken: list[str] = []
    thought: list[str] = []
    channel, place, text = "", "header", ""
    for special, piece in [*pieces, (True, "")]:
        if not special:
            text += piece
            continue
        if place == "name":
            channel = text.split()[0] if text.split() else ""
        elif place == "body":
            (spoken if channel == "final" else thought).append(text)
        text = ""
        place = {CHANNEL: "name", MESSAGE: "body"}.get(piece, "header")
    return "".join(spoken), "\n".join(each.strip() for each in thought) if thought else None


class Reader(Protocol):
    def read_answer(self, ids: Sequence[int], opened: str = "", *, over: bool = True) -> Answer: ...


class StreamDecoder:
    """Return text pieces of an answer as its tokens arrive, without its reasoning. An incomplete character is held back."""

    def __init__(self, tokenizer: Reader, opened: str = "") -> None:
        """Start an answer. opened: the prompt's text before the answer, which may have opened a reasoning block."""
        self._tokenizer = tokenizer
        self._opened = opened
        self._ids: list[int] = []
        self._said = ""
        self.reasoning = ""  # as far as it is certain

    def push(self, token: int) -> str:
        """Return the text that one more token adds; may be empty."""
        self._ids.append(token)
        text = self._text().rstrip("\ufffd")
        if not text.startswith(self._said):
            return ""
        piece = text[len(self._said) :]
        self._said = text
        return piece

    def rest(self) -> str:
        """Return the text still held back when the answer is over: an incomplete last character."""
        return self._text(over=True).removeprefix(self._said)

    def _text(self, *, over: bool = False) -> str:
        answer = self._tokenizer.read_answer(self._ids, self._opened, over=over)
        thought = (answer.reasoning or "").rstrip("\ufffd") if not over else answer.reasoning or ""
        if thought.startswith(self.reasoning):
            self.reasoning = thought
        return answer.text


__all__ = ["Answer", "StreamDecoder", "split_answer"]
