"""Compare a model with quantised weights with the same model in float32: agreement, bytes, time of a step and of a prompt.

``python -m research.weights smollm2 --text docs/LOG.md`` prints a table and appends its rows to benchmarks/results/weights.jsonl.
Agreement is that of teacher-forced tokens; times are medians of runs that take turns, so that what slows the machine slows all.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from loopserve.bench.speed.engine import machine
from loopserve.models.loading import load
from loopserve.models.quantised import quantise

PROMPT, FORCED, STEPS, PROMPTS = 512, 256, 30, 5


def forced(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Return log-probabilities ``[FORCED, V]`` after each of the last tokens, read one by one after the prompt."""
    cache, rows = DynamicCache(), []
    with torch.no_grad():
        model(ids[:, :PROMPT], past_key_values=cache)
        for place in range(PROMPT, PROMPT + FORCED):
            rows.append(model(ids[:, place : place + 1], past_key_values=cache).logits[0, -1])
    return torch.stack(rows).float().log_softmax(-1)


def timed(models: dict[str, PreTrainedModel], ids: Tensor) -> dict[str, tuple[float, float]]:
    """Return milliseconds of (a decode step, reading the prompt) of each model."""
    caches = {name: DynamicCache() for name in models}
    steps: dict[str, list[float]] = {name: [] for name in models}
    prompts: dict[str, list[float]] = {name: [] for name in models}
    with torch.no_grad():
        for name, model in models.items():
            model(ids[:, :PROMPT], past_key_values=caches[name])
        for place in range(PROMPT, PROMPT + STEPS):
            for name, model in models.items():
                started = time.perf_counter()
                model(ids[:, place : place + 1], past_key_values=caches[name])
                steps[name].append(time.perf_counter() - started)
        for _ in range(PROMPTS):
            for name, model in models.items():
                started = time.perf_counter()
                model(ids[:, :PROMPT])
                prompts[name].append(time.perf_counter() - started)
    return {name: (1000 * statistics.median(steps[name]), 1000 * statistics.median(prompts[name])) for name in models}


def rows(name: str, text: str, dtype: str) -> list[dict[str, Any]]:
    """Return one row per format of weights."""
    exact, tokenizer = load(name, dtype="float32")
    ids = torch.tensor([tokenizer(text)["input_ids"][: PROMPT + FORCED]], dtype=torch.long)
    if ids.shape[1] < PROMPT + FORCED:
        raise SystemExit(f"the text has {ids.shape[1]} tokens, {PROMPT + FORCED} are needed")
    wanted = forced(exact, ids)
    plain, _ = load(name, dtype=dtype)
    models, mebibytes = {"auto": plain}, {"auto": sum(each.nbytes for each in plain.parameters()) / 2**20}
    for weights in ("int8", "int4"):
        models[weights] = copy.deepcopy(plain)
        mebibytes[weights] = quantise(models[weights], weights).bytes_after / 2**20
    times = timed(models, ids)
    found = []
    for weights, model in models.items():
        kl, same = compared(wanted, forced(model, ids))
        step, prompt = times[weights]
        found.append(
            {
                "kind": "weights",
                "model": name,
                "dtype": dtype,
                "weights": weights,
                "mebibytes": round(mebibytes[weights], 1),
                "tokens": FORCED,
                "kl": float(kl.mean()),
                "kl_error": float(kl.std() / len(kl) ** 0.5),
                "top1": float(same.mean()),
                "step_ms": round(step, 2),
                "prompt_ms": round(prompt, 1),
                "threads": torch.get_num_threads(),
                "machine": machine(),
            }
        )
    return found


def compared(wanted: Tensor, found: Tensor) -> tuple[Tensor, Tensor]:
    """Return (KL divergence, same most likely token) of each place."""
    return (wanted.exp() * (wanted - found)).sum(-1), (wanted.argmax(-1) == found.argmax(-1)).float()


def table(found: list[dict[str, Any]]) -> str:
    """Return the rows as a table."""
    lines = [
        "| weights | MiB | KL | same first token | a step | 512 tokens read |",
        "|---|---|---|---|---|---|",
    ]
    for row in found:
        lines.append(
            f"| `{row['weights']}` | {row['mebibytes']:.0f} | {row['kl']:.4f} ± {row['kl_error']:.4f} | {row['top1']:.1%} "
            f"| {row['step_ms']:.1f} ms | {row['prompt_ms']:,.0f} ms |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", type=Path, required=True, help="a text of 800 tokens or more")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/weights.jsonl"))
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    found = rows(given.model, given.text.read_text(encoding="utf-8"), given.dtype)
    with given.output.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in found)
    print(table(found))


if __name__ == "__main__":
    main()
