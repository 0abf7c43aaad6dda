"""Time vLLM with a stack beside vLLM without one: prefill, time between tokens, and throughput, in paired runs of one process.

The model has 12 layers, 768 wide, 12 query and 4 KV heads of 64, and random weights, whose attention is spread wider than that of a
trained one: what the sparsifier saves on it is a lower bound. Run by `make bench-vllm`; rows are appended to a JSONL file.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

os.environ.update(
    VLLM_CPU_KVCACHE_SPACE="2",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_LOGGING_LEVEL="ERROR",
    HF_HUB_OFFLINE="1",
)
VOCABULARY = 1024
BLOCK = 128


def engine(directory: str, longest: int, stack: str | None) -> Any:
    from vllm import LLM

    extra = {"additional_config": {"loopserve": {"stack": stack}}} if stack else {}
    return LLM(
        directory,
        skip_tokenizer_init=True,
        dtype="float32",
        enforce_eager=True,
        max_model_len=longest,
        max_num_seqs=8,
        max_num_batched_tokens=2048,
        block_size=BLOCK,
        **extra,
    )


def seconds(llm: Any, prompts: list[list[int]], outputs: int) -> float:
    from vllm import SamplingParams

    sampling = SamplingParams(max_tokens=outputs, temperature=0, ignore_eos=True, detokenize=False)
    started = time.perf_counter()
    llm.generate([{"prompt_token_ids": each} for each in prompts], sampling, use_tqdm=False)
    return time.perf_counter() - started


def measure(
    engines: dict[str, Any], history: int, requests: int, outputs: int, runs: int, seed: int
) -> list[dict[str, Any]]:
    """Prefill a history once, then time answers of requests that share it but for their last tokens."""
    from loopserve_vllm import figures

    draw = random.Random(seed)
    shared = [draw.randrange(VOCABULARY) for _ in range(history - BLOCK // 2)]
    prompts = [[*shared, *(draw.randrange(VOCABULARY) for _ in range(BLOCK // 2))] for _ in range(requests)]
    first = {name: seconds(llm, prompts[:1], 1) for name, llm in engines.items()}
    density = figures()[-1]["prefill_tile_density"]
    between: dict[str, list[float]] = {name: [] for name in engines}
    for _ in range(runs):
        for name, llm in engines.items():
            seconds(llm, prompts, 1)  # every request's own tokens are in the prefix cache, or computed, alike
            short, long = seconds(llm, prompts, 1), seconds(llm, prompts, 1 + outputs)
            between[name].append((long - short) / outputs * 1e3)
    attended = figures()[-1]["attended_fraction"]
    return [
        {
            "history": history,
            "requests": requests,
            "stack": name,
            "prefill_s": round(first[name], 3),
            "itl_ms": round(median(between[name]), 3),
            "itl_ms_runs": [round(each, 3) for each in between[name]],
            "tokens_per_s": round(requests * 1e3 / median(between[name]), 2),
            "prefill_tile_density": density if name != "stock" else None,
            "attended_fraction": attended if name != "stock" else None,
            "threads": int(os.environ.get("OMP_NUM_THREADS", 0)) or os.cpu_count(),
        }
        for name in engines
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--history", type=int, nargs="+", default=[2048, 8192, 16384])
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--stack", default="loopserve")
    parser.add_argument("--outputs", type=int, default=32)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/vllm.jsonl"))
    options = parser.parse_args()
    from loopserve.models.random import random_llama

    with tempfile.TemporaryDirectory() as directory:
        longest = max(options.history) + 2 * options.outputs + BLOCK
        shape = {"layers": 12, "hidden": 768, "heads": 12, "kv_heads": 4, "intermediate": 2048}
        random_llama(**shape, vocabulary=VOCABULARY, positions=longest).save_pretrained(directory)
        engines = {"stock": engine(directory, longest, None), options.stack: engine(directory, longest, options.stack)}
        for history in options.history:
            for requests in options.requests:
                for row in measure(engines, history, requests, options.outputs, options.runs, seed=history + requests):
                    print(json.dumps(row), flush=True)
                    with options.output.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
