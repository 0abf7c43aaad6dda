"""Convert the log-probabilities of an answer's tokens to text and bytes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from loopserve.core.engine.sampling import ChosenLogprob
from loopserve.models.chat import ChatTokenizer

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True)
class TopLogprob:
    """Hold one of the most likely tokens at a position of an answer."""

    token_id: int
    token: str  # its text; incomplete characters appear as U+FFFD
    bytes: bytes
    logprob: float


@dataclass(frozen=True)
class TokenLogprob(TopLogprob):
    """Hold one token of an answer. Log-probabilities are natural, of the model's own distribution.

    That is the distribution before bias, penalties, logits processors and temperature.
    """

    top: tuple[TopLogprob, ...] = ()  # the most likely tokens in its place, most likely first


def token_logprobs(tokenizer: ChatTokenizer, chosen: Sequence[ChosenLogprob]) -> tuple[TokenLogprob, ...]:
    """Return one entry per token of an answer, the stop token included."""
    vocabulary = TokenBytes(tokenizer)

    def said(token: int) -> tuple[str, bytes]:
        raw = vocabulary.of(token)
        return raw.decode("utf-8", errors="replace"), raw

    entries = []
    for each in chosen:
        top = tuple(TopLogprob(token, *said(token), logprob) for token, logprob in each.top)
        entries.append(TokenLogprob(each.token_id, *said(each.token_id), each.logprob, top))
    return tuple(entries)


class TokenBytes:
    """Map single tokens to their bytes."""

    def __init__(self, tokenizer: ChatTokenizer) -> None:
        self._tokenizer = tokenizer.tokenizer
        self._added = {token: str(added).encode() for token, added in self._tokenizer.added_tokens_decoder.items()}
        decoder = getattr(getattr(self._tokenizer, "backend_tokenizer", None), "decoder", None)
        self._table = _byte_level() if "ByteLevel" in str(decoder) else {}

    def of(self, token: int) -> bytes:
        """Return the bytes of a token; empty for an id that the tokenizer does not know."""
        if token in self._added:
            return self._added[token]
        piece: str | None = self._tokenizer.convert_ids_to_tokens(token)
        if piece is None:
            return b""
        if self._table and all(each in self._table for each in piece):
            return bytes(self._table[each] for each in piece)
        if match := _BYTE.fullmatch(piece):
            return bytes([int(match.group(1), 16)])
        return piece.replace("\u2581", " ").encode(errors="replace")  # sentencepiece writes spaces as U+2581


@cache
def _byte_level() -> dict[str, int]:
    """Return the byte that each character of a byte-level token stands for.

    Printable characters of Latin-1 stand for themselves. All other bytes are mapped, in order, to the characters from U+0100 on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}
