"""Measure from which lengths a stack pays, in paired runs on the model itself: long turns, short turns, decode steps.

Two sessions read the same text, one under dense attention and one under the stack. At each length a long turn (the text since the
length before), a short one and a few decode steps are timed on both, in turns.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import closing
from importlib.resources import files
from statistics import median
from typing import NamedTuple

from loopserve.api import Engine, load_stack
from loopserve.core.engine.break_even import BreakEven, Pair, pays_from
from loopserve.core.engine.engine import TokenEngine
from loopserve.core.engine.sampling import SamplingConfig
from loopserve.core.engine.session import Session
from loopserve.core.errors import ConfigError

LENGTHS = (2048, 4096, 6144, 8000)
SHORT_TURN = 256  # new tokens of a short turn
OUTPUTS = 8
ROUNDS = 3

Progress = Callable[[str, int, int], None]


class Measured(NamedTuple):
    """Hold the pairs of times by kind of work. Work at which the stack itself stays dense is left out."""

    long_turn: list[Pair]
    short_turn: list[Pair]
    decode: list[Pair]

    @property
    def break_even(self) -> BreakEven:
        return BreakEven(*map(pays_from, self))


class _Times(NamedTuple):
    first_token_s: float
    step_s: float
    density: float
    attended: float


def measure(engine: Engine, lengths: Sequence[int] = LENGTHS, progress: Progress | None = None) -> Measured:
    """Time the engine's stack beside dense attention at each of the lengths, in tokens.

    Raises ConfigError for a stack that cannot be dense below a length, and if no length fits the model.
    """
    own = engine.token_engine
    if engine.stack.is_dense:
        raise ConfigError(f"stack {engine.stack.name!r} is dense at every length: there is nothing to calibrate")
    if own.slots.evicts:
        raise ConfigError(
            f"stack {engine.stack.name!r} evicts pairs to save memory, which it must do at every length: there is nothing to calibrate"
        )
    lengths = _fitting(lengths, own)
    stacked = TokenEngine(own.model, engine.stack, chunk_tokens=own.chunk_tokens)  # without the engine's own break-even
    dense = load_stack("dense")
    text = _text(engine, lengths[-1])
    sessions = (stacked.session(dense), stacked.session())
    found = Measured([], [], [])
    with closing(sessions[0]), closing(sessions[1]):
        for number, length in enumerate(lengths):
            if progress is not None:
                progress(f"{length} tokens", number, len(lengths))
            seen = len(sessions[0].tokens)
            whole = [_turn(stacked, each, text[seen : length - SHORT_TURN], 1) for each in sessions]
            if whole[1].density < 1:
                found.long_turn.append(Pair(length - SHORT_TURN, whole[0].first_token_s, whole[1].first_token_s))
            _back(sessions, length - SHORT_TURN)
            rounds = [
                [_again(stacked, each, text[length - SHORT_TURN : length]) for each in sessions] for _ in range(ROUNDS)
            ]
            sides = list(zip(*rounds, strict=True))
            if sides[1][0].density < 1:
                found.short_turn.append(Pair(length, *(median(each.first_token_s for each in side) for side in sides)))
            if sides[1][0].attended < 1:
                found.decode.append(Pair(length, *(median(each.step_s for each in side) for side in sides)))
    return found


def _fitting(lengths: Sequence[int], engine: TokenEngine) -> list[int]:
    longest = engine.model.max_positions
    fit = sorted(
        each for each in set(lengths) if each > 2 * SHORT_TURN and (longest is None or each + 1 + OUTPUTS <= longest)
    )
    if not fit:
        raise ConfigError(
            f"none of the lengths {', '.join(map(str, lengths))} can be measured: the model takes {longest} tokens, "
            f"{1 + OUTPUTS} of them outputs, and {2 * SHORT_TURN} are too few"
        )
    return fit


def _text(engine: Engine, tokens: int) -> list[int]:
    """Return so many tokens of a novel's chapters."""
    folder = files("loopserve.bench") / "data" / "moby_dick"
    parts = sorted(each.name for each in folder.iterdir() if each.name.endswith(".txt"))
    ids = engine.tokenizer.text_tokens("\n\n".join((folder / each).read_text(encoding="utf-8") for each in parts))
    return (ids * (tokens // len(ids) + 1))[:tokens]


def _turn(engine: TokenEngine, session: Session, new: list[int], outputs: int) -> _Times:
    started = time.perf_counter()
    answer = engine.generate(session, new, SamplingConfig(max_new_tokens=outputs))
    next(answer)
    first = time.perf_counter()
    for _ in answer:
        pass
    ended = time.perf_counter()
    figures = session.turns[-1].as_dict()
    return _Times(
        first - started,
        (ended - first) / max(1, outputs - 1),
        _known(figures["prefill_tile_density"]),
        _known(figures["attended_fraction"]),
    )


def _known(share: float | None) -> float:
    return 1.0 if share is None else share


def _again(engine: TokenEngine, session: Session, new: list[int]) -> _Times:
    """Time a turn and take it back."""
    length = len(session.tokens)
    times = _turn(engine, session, new, 1 + OUTPUTS)
    session.go_back(length)
    return times


def _back(sessions: Sequence[Session], length: int) -> None:
    for each in sessions:
        each.go_back(length)
