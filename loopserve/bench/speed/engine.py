"""Compare our engine with transformers' generation: dense attention, same model and prompts, paired runs in one process."""

from __future__ import annotations

import os
import platform
import time
from importlib.metadata import version
from statistics import median, quantiles
from typing import Any

import torch

from loopserve.api import load_stack
from loopserve.core.engine.engine import TokenEngine
from loopserve.core.engine.sampling import SamplingConfig
from loopserve.models.bridge import IMPLEMENTATION, TransformersModel
from loopserve.models.layers import set_implementation, vocabulary_size
from loopserve.models.loading import load
from loopserve.models.plain import converse

_TURNS = 3


def run_engine_bench(
    *,
    model: str = "demo",
    history: int = 2048,
    new_tokens: int = 64,
    output_tokens: int = 48,
    runs: int = 7,
    stack: str = "dense",
) -> dict[str, Any]:
    """Return rows of medians and of ratios of engine to transformers: below 1 the engine is faster.

    A run is a conversation of three turns: a long first message (``history`` tokens), then two of ``new_tokens``, each
    answered with ``output_tokens``. Transformers keeps its cache over the turns as well.
    """
    loaded, _ = load(model)
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
