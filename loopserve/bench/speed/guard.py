"""Measure the cost of the guard around policies: the same answer with and without it, step by step in one process."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import wraps
from statistics import median, quantiles
from typing import Any
from unittest.mock import patch

import torch

from loopserve.api import load_stack
from loopserve.bench.speed.engine import machine
from loopserve.core.engine import decode_step, turn
from loopserve.core.engine.engine import TokenEngine
from loopserve.core.engine.sampling import SamplingConfig
from loopserve.core.guard.guard import Guard, check_selection
from loopserve.core.kv import buffers
from loopserve.models.bridge import IMPLEMENTATION, TransformersModel
from loopserve.models.layers import set_implementation, vocabulary_size
from loopserve.models.loading import load

SIDES = ("guarded", "bare")


class Bare(Guard):
    """Call a policy without any check."""

    def _watched(
        self, policy: Any, inputs: Any, method: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]
    ) -> Any:
        return method(*args, **options)

    def ask(self, policy: Any, method: Callable[..., Any], *args: Any, **options: Any) -> Any:
        return method(*args, **options)


class Clocked(Guard):
    """Measure the guard's own time in each call: the total less the policy's."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds = 0.0

    def ask(self, policy: Any, method: Callable[..., Any], *args: Any, **options: Any) -> Any:
        theirs = 0.0

        @wraps(method)
        def timed(*args: Any, **options: Any) -> Any:
            nonlocal theirs
            began = time.perf_counter()
            try:
                return method(*args, **options)
            finally:
                theirs = time.perf_counter() - began

        started = time.perf_counter()
        try:
            return super().ask(policy, timed, *args, **options)
        finally:
            self.seconds += time.perf_counter() - started - theirs


@contextmanager
def _checking(looks: bool) -> Iterator[None]:
    """Switch validation and write counting on or off in this block.

    Both states take the same path, so that neither side starts with colder caches.
    """
    judge = check_selection if looks else lambda *_: None
    count = buffers.versions if looks else lambda *_: ()
    with ExitStack() as undo:
        for module in (decode_step, turn):
            undo.enter_context(patch.object(module, "check_selection", judge))
        undo.enter_context(patch.object(buffers, "versions", count))
        yield


def run_guard_bench(
    *,
    model: str = "demo",
    stacks: Sequence[str] = ("dense", "snapkv", "quest", "loopserve"),
    history: int = 6144,
    output_tokens: int = 64,
    runs: int = 5,
    dtype: str = "auto",
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Return a row per stack: milliseconds of a decode step on both sides, and their ratio, guarded to bare, step by step.

    ``asking_us`` is the guard's own time around the calls of one step, in microseconds. A run is an answer of
    ``output_tokens`` to a message of ``history`` tokens. Both sides take each step in turn, and the order alternates
    with every step.
    """
    loaded, _ = load(model, dtype=dtype)
    set_implementation(loaded, IMPLEMENTATION)
    draw = torch.Generator().manual_seed(0)
    prompt = torch.randint(8, vocabulary_size(loaded), (history,), generator=draw, device="cpu").tolist()
    rows = []
    for stack in stacks:
        progress(f"guard: {stack}")
        served = TokenEngine(TransformersModel(loaded), load_stack(stack))
        seconds: dict[str, list[float]] = {side: [] for side in SIDES}
        same = True
        for run in range(runs + 1):
            found, answers = _answers(served, prompt, output_tokens)
            same &= answers["guarded"] == answers["bare"]
            for side in SIDES if run else ():  # the first run warms up
                seconds[side] += found[side]
        ratios = [one / other for one, other in zip(seconds["guarded"], seconds["bare"], strict=True)]
        fifths = quantiles(ratios, n=5)
        rows.append(
            {
                "op": "policy_guard",
                "model": model,
                "stack": stack,
                "history": history,
                "output_tokens": output_tokens,
                "runs": runs,
                "steps": len(ratios),
                "guarded_ms": median(seconds["guarded"]) * 1e3,
                "bare_ms": median(seconds["bare"]) * 1e3,
                "asking_us": _asking(served, prompt, output_tokens) * 1e6,
                "ratio": median(seconds["guarded"]) / median(seconds["bare"]),
                "ratio_paired_median": median(ratios),
                "ratio_q20": fifths[0],
                "ratio_q80": fifths[-1],
                "same_tokens": same,
            }
        )
    return {"rows": rows, "machine": machine()}


def _asking(served: TokenEngine, prompt: list[int], output_tokens: int) -> float:
    """Return seconds of a decode step that the guard spends around calls of policies: the median over an answer."""
    session, clocked = served.session(), Clocked()
    served.guard = session.guard = clocked
    found = []
    for _ in served.generate(session, prompt, SamplingConfig(max_new_tokens=output_tokens), frozenset()):
        found.append(clocked.seconds)
        clocked.seconds = 0.0
    return median(found[1:])


def _answers(
    served: TokenEngine, prompt: list[int], output_tokens: int
) -> tuple[dict[str, list[float]], dict[str, list[int]]]:
    """Return seconds of each decode step, and the tokens, by side."""
    sampling = SamplingConfig(max_new_tokens=output_tokens)
    sessions = {side: served.session() for side in SIDES}
    sessions["bare"].guard = Bare()
    answers = {side: served.generate(sessions[side], prompt, sampling, frozenset()) for side in SIDES}
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    tokens: dict[str, list[int]] = {side: [] for side in SIDES}
    for step in range(output_tokens):
        for side in SIDES if step % 2 else reversed(SIDES):
            with _checking(side == "guarded"):
                started = time.perf_counter()
                tokens[side].append(next(answers[side]))
                if step:
                    seconds[side].append(time.perf_counter() - started)
    return seconds, tokens
