"""The stages of training: how long the dialogues are, what they ask, and for how many seconds."""

from __future__ import annotations

from dataclasses import dataclass
from math import exp, log
from random import Random

from loopserve.bench.recall import HELD_OUT_SEED, Layout, RecallTask, lay_out


@dataclass(frozen=True)
class Stage:
    """One stage. Lengths are drawn log-uniformly from `tokens`; `goal` of 100 answers right ends it early."""

    name: str
    seconds: float
    tokens: tuple[int, int]
    turns: int
    keys: int
    batch_tokens: int = 4096
    attention: float = 0.0
    """Weight of the auxiliary attention loss."""
    lookahead: float = 0.0
    """Weight of the look-ahead loss."""
    foresight: float = 0.0
    """Weight of the auxiliary attention loss that teaches two heads to look at the code that comes next."""
    skips: float = 0.0
    """Share of batches with gaps in their position ids."""
    chains: float = 0.0
    """Share of asked places whose code is kept in another place."""
    silent: float = 0.04
    """Share of turns that ask nothing."""
    again: float = 0.0
    """Share of asked places that were asked for before."""
    rate: tuple[float, float] = (1.0, 1.0)
    """Learning-rate factor at the start and the end."""
    goal: float = 101.0


MAIN: tuple[Stage, ...] = (
    Stage("1-one-key", 240, (48, 64), 1, 1, 2048, attention=1.0, rate=(2.0, 1.5), goal=95),
    Stage("2-two-keys", 150, (64, 112), 2, 2, 2048, attention=1.0, rate=(1.5, 1.0), goal=93),
    Stage("3-three-keys", 200, (96, 192), 4, 3, 3072, attention=0.5, skips=0.2, chains=0.05, goal=94),
    Stage("4-short", 240, (128, 320), 6, 4, attention=0.2, skips=0.3, chains=0.05, goal=95),
    Stage("5-lookahead", 480, (128, 448), 8, 5, attention=0.1, lookahead=1.0, foresight=0.3, skips=0.35, chains=0.05),
    Stage(
        "6-1024",
        840,
        (192, 1024),
        10,
        5,
        attention=0.05,
        lookahead=1.0,
        foresight=0.1,
        skips=0.35,
        chains=0.05,
        again=0.06,
    ),
    Stage(
        "7-2048",
        2040,
        (384, 3072),
        14,
        5,
        6144,
        attention=0.02,
        lookahead=0.5,
        foresight=0.05,
        skips=0.2,
        chains=0.05,
        again=0.06,
        rate=(0.9, 0.04),
    ),
)
"""The default model."""

NO_LOOKAHEAD: tuple[Stage, ...] = (
    Stage("5-plain", 330, (128, 768), 8, 4, attention=0.05, skips=0.3, chains=0.05, again=0.06, rate=(1.0, 0.05)),
)
"""The second checkpoint goes on from stage 4 of MAIN without look-ahead."""

CURRICULA = {"recall": MAIN, "recall_no_lookahead": NO_LOOKAHEAD}


def draw_batch(stage: Stage, rng: Random) -> list[Layout]:
    """Dialogues of one common length, each with a task of its own; no seed is a held-out one."""
    low, high = stage.tokens
    tokens = round(exp(rng.uniform(log(low), log(high))))
    layouts: list[Layout] = []
    while len(layouts) < max(1, stage.batch_tokens // tokens):
        seed = rng.randrange(HELD_OUT_SEED)
        assert seed < HELD_OUT_SEED
        layout = lay_out(_draw_task(stage, tokens, rng), seed)
        if len(layout.words) <= 1.1 * tokens + 4:  # one long dialogue would pad all the others
            layouts.append(layout)
    return layouts


def _draw_task(stage: Stage, tokens: int, rng: Random) -> RecallTask:
    most_turns = max(1, min(stage.turns, tokens // 40))
    turns = max(rng.randint(1, most_turns), rng.randint(1, most_turns))  # many answers teach more than few
    return RecallTask(
        tokens=tokens,
        turns=turns,
        keys=(1, rng.randint(1, stage.keys)) if rng.random() < 0.5 else (1, stage.keys),
        fact_share=rng.uniform(0.12, 0.55),
        uneven=rng.random() < 0.7,
        silent_share=stage.silent if turns > 1 else 0.0,
        chain=1 if not stage.chains else rng.choice((2, 2, 3)),
        chain_share=stage.chains,
        again_share=stage.again,
    )
