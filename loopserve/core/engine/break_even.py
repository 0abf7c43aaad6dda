"""Say from how many tokens on a stack is faster than dense attention on this machine. Below it the engine stays dense."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

TOLERANCE = 0.02  # share by which a stack may seem slower without being so: what repeated runs differ by
LONG_TURN = 1024  # new tokens in one pass from which choosing lines costs little beside attending to them


@dataclass(frozen=True)
class BreakEven:
    """Hold tokens of a conversation below which a layer stays dense; 0 = never, inf = always.

    long_turn: for passes of at least ``LONG_TURN`` new tokens. short_turn: for passes of fewer. decode: for decode steps; it holds
    only for compressors that can begin late, which are those that declare ``dense_below_tokens``.
    """

    long_turn: float = 0.0
    short_turn: float = 0.0
    decode: float = 0.0

    def allows_sparse(self, new_tokens: int, total_tokens: int) -> bool:
        """Return whether a sparsifier may choose for a pass of ``new_tokens`` that ends at ``total_tokens``."""
        return total_tokens >= (self.long_turn if new_tokens >= LONG_TURN else self.short_turn)

    def dense_below(self, declared: int) -> int:
        """Return the pairs up to which a layer is decoded dense, for a compressor that declares so many."""
        if not declared:
            return 0
        return int(max(declared, min(self.decode, 2**62)))


class Pair(NamedTuple):
    """Hold the seconds of the same work at a length: dense, and under the stack."""

    tokens: int
    dense_s: float
    sparse_s: float


def pays_from(pairs: Sequence[Pair]) -> float:
    """Return from how many tokens on the stack is not slower than dense, by measurements at several lengths.

    0 where it is not at any length. Otherwise the place where a line through the differences meets zero, by least squares, but no
    less than the longest length at which the stack was slower. inf where the stack does not gain with length.
    """
    slower = [each.tokens for each in pairs if each.sparse_s > (1 + TOLERANCE) * each.dense_s]
    if not slower:
        return 0.0
    count = len(pairs)
    tokens = sum(each.tokens for each in pairs) / count
    gain = sum(each.dense_s - each.sparse_s for each in pairs) / count
    spread = sum((each.tokens - tokens) ** 2 for each in pairs)
    shared = sum((each.tokens - tokens) * (each.dense_s - each.sparse_s - gain) for each in pairs)
    if spread == 0 or shared <= 0:
        return math.inf
    return max(tokens - gain * spread / shared, max(slower) + 1.0)
