"""Measure the engine against transformers' generation, and shared forward passes of several sessions.

Both sides of a run use the same model and prompts, in one process.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from statistics import median, quantiles
from typing import Any

import torch

from loopserve.api import load_stack
from loopserve.core.engine.engine import TokenEngine
from loopserve.core.engine.sampling import SamplingConfig
from loopserve.core.engine.scheduler import Scheduler
from loopserve.core.engine.session import Session
from loopserve.models.bridge import IMPLEMENTATION, TransformersModel
from loopserve.models.layers import set_implementation, vocabulary_size
from loopserve.models.loading import DTYPES, load
from loopserve.models.plain import converse
from loopserve.models.random import random_llama

_TURNS = 3
RANDOM = "random"  # 12 layers, 768 wide, 12 query and 4 KV heads of 64, random weights
SESSIONS = (1, 2, 4, 8, 16)
STACKS = ("dense", "loopserve", "loopserve-paper")


def run_engine_bench(
    *,
    model: str = "demo",
    history: int = 2048,
    new_tokens: int = 64,
    output_tokens: int = 48,
    runs: int = 7,
    stack: str = "dense",
    dtype: str = "auto",
) -> dict[str, Any]:
    """Return rows of medians and of ratios of engine to transformers: below 1 the engine is faster.

    A run is a conversation of three turns: a long first message (``history`` tokens), then two of ``new_tokens``, each
    answered with ``output_tokens``. Transformers keeps its cache over the turns as well.
    """
    loaded, _ = load(model, dtype=dtype)
    engine = TokenEngine(TransformersModel(loaded), load_stack(stack))
    prompts = _prompts(vocabulary_size(loaded), history, new_tokens)
    times: dict[str, list[float]] = {"engine": [], "transformers": []}
    answers: dict[str, list[int]] = {}
    for run in range(runs + 1):
        for side in ("engine", "transformers") if run % 2 else ("transformers", "engine"):
            set_implementation(loaded, IMPLEMENTATION if side == "engine" else "sdpa")
            started = time.perf_counter()
            answer = (
                _by_engine(engine, prompts, output_tokens)
                if side == "engine"
                else converse(loaded, prompts, output_tokens)
            )
            if run:  # the first run warms up
                times[side].append(time.perf_counter() - started)
            answers[side] = answer
    ratios = [ours / theirs for ours, theirs in zip(times["engine"], times["transformers"], strict=True)]
    low, high = quantiles(ratios, n=5)[0], quantiles(ratios, n=5)[-1]
    row = {
        "op": "conversation",
        "model": model,
        "stack": stack,
        "history": history,
        "new_tokens": new_tokens,
        "output_tokens": output_tokens,
        "runs": runs,
        "engine_ms": median(times["engine"]) * 1e3,
        "transformers_ms": median(times["transformers"]) * 1e3,
        "ratio": median(times["engine"]) / median(times["transformers"]),
        "ratio_paired_median": median(ratios),
        "ratio_q20": low,
        "ratio_q80": high,
        "same_tokens": answers["engine"] == answers["transformers"],
    }
    return {"rows": [row], "machine": machine()}


def machine() -> dict[str, Any]:
    """Return the machine and the versions of a measurement."""
    return {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }


def _prompts(vocabulary: int, history: int, new_tokens: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    lengths = [history] + [new_tokens] * (_TURNS - 1)
    return [torch.randint(8, vocabulary, (length,), generator=generator, device="cpu").tolist() for length in lengths]


def _by_engine(engine: TokenEngine, prompts: list[list[int]], output_tokens: int) -> list[int]:
    session = engine.session()
    sampling = SamplingConfig(max_new_tokens=output_tokens)
    return [token for prompt in prompts for token in engine.generate(session, prompt, sampling, frozenset())]


def run_batch_bench(
    *,
    model: str = RANDOM,
    stacks: Sequence[str] = STACKS,
    sessions: Sequence[int] = SESSIONS,
    history: int = 4096,
    output_tokens: int = 24,
    runs: int = 3,
    dtype: str = "auto",
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Return a row per stack and number of sessions: milliseconds per output token in shared passes and one by one.

    Every session has ``history`` tokens and answers a short message with ``output_tokens`` tokens. Only decode steps
    are timed. Both sides of a run are measured in one process, in turn. ``ratio`` is sequential to shared time: above 1
    sharing is faster.
    """
    loaded = _model(model, history + output_tokens + 64, dtype)
    rows = []
    for stack in stacks:
        engine = TokenEngine(TransformersModel(loaded), load_stack(stack))
        held = _held(engine, loaded, history)
        for count in sessions:
            progress(f"batch: {stack}, {count} sessions of {history} tokens")
            rows.append(_decode_row(engine, held, count, output_tokens, runs) | {"stack": stack, "model": model})
    return {"rows": rows, "machine": machine() | {"dtype": str(loaded.dtype).removeprefix("torch.")}}


def run_wait_bench(
    *,
    model: str = RANDOM,
    stack: str = "dense",
    prompt: int = 8192,
    short: int = 256,
    max_num_batched_tokens: int = 512,
    runs: int = 5,
    dtype: str = "auto",
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Return one row: time to first token of a short prompt alone, and beside the prefill of a long one.

    The short prompt arrives at ``runs`` positions of the long prefill, which is cut to the model's window.
    """
    loaded = _model(model, prompt + short + 64, dtype)
    engine = TokenEngine(TransformersModel(loaded), load_stack(stack))
    sampling = SamplingConfig(max_new_tokens=2)
    if engine.model.max_positions is not None:  # the prompt and its two tokens
        prompt = min(prompt, engine.model.max_positions - sampling.max_new_tokens)
    ids = _prompt(loaded, prompt, 0)
    alone: list[float] = []
    beside: list[float] = []
    for run in range(runs + 1):
        progress(f"wait: {short} tokens beside {prompt}, run {run} of {runs}")
        words = _prompt(loaded, short, run + 1)
        scheduler = Scheduler(engine, max_num_batched_tokens=max_num_batched_tokens)
        seconds = _first_token(scheduler, engine.session(), words)
        if run:  # the first run warms up
            alone.append(seconds)
            scheduler = Scheduler(engine, max_num_batched_tokens=max_num_batched_tokens)
            long = scheduler.submit(engine.session(), ids, sampling)
            for _ in range(1 + (run - 1) * (prompt // max_num_batched_tokens - 2) // max(1, runs - 1)):
                scheduler.step()
            beside.append(_first_token(scheduler, engine.session(), words))
            scheduler.cancel(long)
            scheduler.run_until_idle()
    ratios = [loaded_s / alone_s for loaded_s, alone_s in zip(beside, alone, strict=True)]
    row = {
        "op": "short_beside_long",
        "model": model,
        "stack": stack,
        "prompt": prompt,
        "short": short,
        "max_num_batched_tokens": max_num_batched_tokens,
        "runs": runs,
        "ttft_alone_ms": median(alone) * 1e3,
        "ttft_beside_ms": median(beside) * 1e3,
        "ratio": median(ratios),
        "ratio_worst": max(ratios),
    }
    return {"rows": [row], "machine": machine() | {"dtype": str(loaded.dtype).removeprefix("torch.")}}


def _first_token(scheduler: Scheduler, session: Session, ids: list[int]) -> float:
    """Return seconds until a prompt's first token, including the pass that is about to run."""
    started = time.perf_counter()
    request = scheduler.submit(session, ids, SamplingConfig(max_new_tokens=1))
    while not request.output:
        scheduler.step()
    return time.perf_counter() - started


def _decode_row(engine: TokenEngine, held: Session, count: int, output_tokens: int, runs: int) -> dict[str, Any]:
    together: list[float] = []
    apart: list[float] = []
    same = True
    for run in range(runs + 1):
        found = {}
        for shared in (True, False) if run % 2 else (False, True):
            found[shared] = _answer(engine, [held.fork() for _ in range(count)], output_tokens, shared)
        same &= found[True][1] == found[False][1]
        if run:  # the first run warms up
            together.append(found[True][0])
            apart.append(found[False][0])
    ratios = [one / other for one, other in zip(apart, together, strict=True)]
    return {
        "op": "batch_decode",
        "sessions": count,
        "history": len(held.tokens),
        "output_tokens": output_tokens,
        "runs": runs,
        "together_ms": min(together) * 1e3,
        "one_after_another_ms": min(apart) * 1e3,
        "tokens_per_s": 1 / min(together),
        "ratio": min(apart) / min(together),
        "ratio_paired_median": median(ratios),
        "same_tokens": same,
    }


def _answer(
    engine: TokenEngine, sessions: list[Session], output_tokens: int, shared: bool
) -> tuple[float, list[list[int]]]:
    """Return seconds per token of the decode steps, and the answers."""
    sampling = SamplingConfig(max_new_tokens=output_tokens)
    asked = [(each, [5 + number, 7]) for number, each in enumerate(sessions)]
    groups = [asked] if shared else [[each] for each in asked]
    seconds, answers = 0.0, []
    for group in groups:
        scheduler = Scheduler(engine, max_sessions=len(group), max_num_batched_tokens=4096)
        requests = [scheduler.submit(each, ids, sampling) for each, ids in group]
        while any(not each.output for each in requests):
            scheduler.step()
        started = time.perf_counter()
        scheduler.run_until_idle()
        seconds += time.perf_counter() - started
        answers += [each.result() for each in requests]
    return seconds / (len(sessions) * (output_tokens - 1)), answers


def _model(name: str, positions: int, dtype: str) -> Any:
    if name == RANDOM:
        loaded = random_llama(
            layers=12,
            hidden=768,
            heads=12,
            kv_heads=4,
            intermediate=3072,
            vocabulary=32_000,
            positions=positions,
            dtype=DTYPES.get(dtype, torch.bfloat16),
        )
    else:
        loaded = load(name, dtype=dtype)[0]
    set_implementation(loaded, IMPLEMENTATION)
    return loaded


def _held(engine: TokenEngine, model: Any, history: int) -> Session:
    """Return a session of ``history`` tokens after one answered turn, so that policies hold their state across turns."""
    session = engine.session()
    list(engine.generate(session, _prompt(model, history - 2, 0), SamplingConfig(max_new_tokens=2)))
    return session


def _prompt(model: Any, tokens: int, seed: int) -> list[int]:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(8, vocabulary_size(model), (tokens,), generator=draw, device="cpu").tolist()
