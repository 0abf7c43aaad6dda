"""Turn the tokens of an answer into text as they arrive, up to the first stop string."""

from __future__ import annotations

from collections.abc import Sequence

from loopserve.core.engine.answer import StopStrings
from loopserve.models.answers import StreamDecoder
from loopserve.models.chat import ChatTokenizer


class AnswerText:
    """Collect the text of one answer. ``push`` is a ``StopCheck`` of the engine.

    Stop strings are searched for in the text that a reader sees, which contains no special tokens. A stop string that is the text
    of a special token ends the answer at that token.
    """

    def __init__(
        self, tokenizer: ChatTokenizer, stop: Sequence[str] = (), decoder: StreamDecoder | None = None
    ) -> None:
        """Start an empty answer. stop: strings that end it; they are not part of its text. decoder: used in place of a plain one."""
        self.stop_string: str | None = None
        self._decoder = decoder or StreamDecoder(tokenizer)
        self._stops = StopStrings(stop)
        self._special = {
            token: str(added) for token, added in tokenizer.tokenizer.added_tokens_decoder.items() if str(added) in stop
        }
        self._given: list[str] = []  # pieces already returned
        self._ready = ""

    def push(self, token: int) -> str | None:
        """Add a token; return the stop string that ends the answer with it."""
        self._add(self._decoder.push(token))
        if self.stop_string is None and token in self._special:
            self.stop_string = self._special[token]
        return self.stop_string

    @property
    def reasoning(self) -> str:
        """Return the reasoning that has become certain so far."""
        return self._decoder.reasoning

    def take(self) -> str:
        """Return the text that has become certain since the last call."""
        piece, self._ready = self._ready, ""
        self._given.append(piece)
        return piece

    def close(self) -> None:
        """End the answer: text that was held back, and an incomplete last character, become part of its text."""
        if self._stops.matched is None:
            self._add(self._decoder.rest())
        self._ready += self._stops.flush()

    @property
    def text(self) -> str:
        """Return the whole answer as it was streamed; complete once it is closed."""
        return "".join(self._given) + self._ready

    def _add(self, piece: str) -> None:
        self._ready += self._stops.push(piece)
        self.stop_string = self.stop_string or self._stops.matched
