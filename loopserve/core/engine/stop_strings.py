"""Find the end of an answer in its text as it arrives in pieces. Depends on no tokens."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Return text up to the first stop string, and hold back text that may become one.

    The result does not depend on how the text is split. The first stop string to be complete ends the answer. If several are
    complete at the same character, the longest one counts.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self.matched: str | None = None
        self._strings = sorted(set(strings), key=len, reverse=True)
        self._longest = max(map(len, strings), default=0)
        self._held = ""

    def push(self, piece: str) -> str:
        """Return the text that is certain to belong to the answer once ``piece`` is added; nothing after a match."""
        if self.matched is not None or not piece:
            return ""
        known, text = len(self._held), self._held + piece
        match = self._first(text, known)
        if match is not None:
            end, self.matched = match
            self._held = ""
            return text[: end - len(self.matched)]
        held = self._possible(text)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def flush(self) -> str:
        """Return the text held back. Call it when the answer is over, since the text is no stop string then."""
        rest, self._held = self._held, ""
        return rest

    def _first(self, text: str, known: int) -> tuple[int, str] | None:
        """Return the end of the stop string that is complete first, and the string. None ends within the first ``known``
        characters.
        """
        match: tuple[int, str] | None = None
        for each in self._strings:  # the longest first: it counts where two end together
            start = text.find(each, max(0, known - len(each) + 1))
            if start >= 0 and (match is None or start + len(each) < match[0]):
                match = start + len(each), each
        return match

    def _possible(self, text: str) -> int:
        """Return the length of the longest end of ``text`` that begins a stop string."""
        for length in range(min(len(text), self._longest - 1), 0, -1):
            end = text[-length:]
            if any(each.startswith(end) for each in self._strings):
                return length
        return 0
