"""Conversations of several turns through vLLM, on the bundled model, with and without a stack."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loopserve_vllm import figures
from loopserve_vllm.requests import Requests
from loopserve_vllm.start import Settings, settings
from vllm import LLM, SamplingParams

from loopserve import Engine, PolicyStack
from loopserve.core.engine.hosted import require_hosted
from loopserve.core.guard.guard import Guard
from loopserve.models.demo import bundled_path

VOCABULARY = 1015
Prompts = list[list[int]]


@dataclass(frozen=True)
class Answer:
    tokens: list[int]
    logits: list[dict[int, float]]  # of the best tokens, at each step
    cached: int
    prompt: list[int]


def engine(stack: Any = None, model: Path | None = None, **options: Any) -> LLM:
    """vLLM with small chunks and blocks, so that a prompt is computed in several steps and later turns find their prefix."""
    given: dict[str, Any] = {
        "max_num_batched_tokens": 256,
        "block_size": 64,
        "max_num_seqs": 8,
        "max_model_len": 4096,
        "dtype": "float32",
    } | options
    if stack is not None:
        given["additional_config"] = {"loopserve": {"stack": stack}}
    return LLM(
        str(model or bundled_path("demo")),
        enforce_eager=True,
        enable_prefix_caching=True,
        logprobs_mode="raw_logits",
        **given,
    )


def runner_of(llm: LLM) -> Any:
    return llm.llm_engine.model_executor.driver_worker.worker.model_runner


def serve_under(llm: LLM, stack: PolicyStack) -> None:
    """Change the stack of a running engine, which was made with another one; nothing is cached."""
    runner = runner_of(llm)
    specs = [each.spec for each in settings(llm.llm_engine.vllm_config).slots.by_layer]
    guard = Guard(on_fault="dense", owners=stack.owners)
    runner.loopserve = Requests(Settings(stack.name, require_hosted(stack, specs), guard), runner)
    assert llm.reset_prefix_cache()


def answer(llm: LLM, prompts: Prompts, outputs: int, **options: Any) -> list[Answer]:
    sampling = SamplingParams(**{"max_tokens": outputs, "temperature": 0, "ignore_eos": True, "logprobs": 8} | options)
    found = llm.generate([{"prompt_token_ids": each} for each in prompts], sampling, use_tqdm=False)
    return [
        Answer(
            list(each.outputs[0].token_ids),
            [{token: entry.logprob for token, entry in step.items()} for step in each.outputs[0].logprobs or ()],
            each.num_cached_tokens or 0,
            prompt,
        )
        for each, prompt in zip(found, prompts, strict=True)
    ]


def talk(
    llm: LLM, requests: int, *, turns: int = 4, first: int = 300, later: int = 150, outputs: int = 8
) -> list[list[Answer]]:
    """Hold ``requests`` conversations at once; return the answers of each turn."""
    draw = random.Random(requests)
    prompts = [[draw.randrange(8, VOCABULARY) for _ in range(first + 7 * each)] for each in range(requests)]
    found = []
    for _ in range(turns):
        found.append(answer(llm, prompts, outputs))
        prompts = [
            [*each.prompt, *each.tokens, *(draw.randrange(8, VOCABULARY) for _ in range(later))] for each in found[-1]
        ]
    return found


def alike(found: Sequence[Sequence[Answer]], wanted: Sequence[Sequence[Answer]]) -> float:
    """Assert equal tokens; return the largest difference of a logit."""
    most = 0.0
    for mine, theirs in zip(found, wanted, strict=True):
        for one, other in zip(mine, theirs, strict=True):
            assert one.tokens == other.tokens
            for step, expected in zip(one.logits, other.logits, strict=True):
                most = max(most, *(abs(step[each] - expected[each]) for each in step.keys() & expected.keys()))
    return most


def beside_own_engine(
    llm: LLM, own: Engine, dialogues: Sequence[Sequence[str]], longest: int
) -> tuple[list[bool], list[tuple[dict[str, Any], dict[str, Any]]]]:
    """Hold dialogues with loopserve's engine, and give vLLM the tokens of each turn.

    Return which answers are equal, and each turn's figures, vLLM's first.
    """
    pairs: list[tuple[dict[str, Any], dict[str, Any]]] = []
    same: list[bool] = []
    for messages in dialogues:
        assert llm.reset_prefix_cache()  # dialogues may begin alike
        with own.session() as chat:
            for message in messages:
                reply = chat.send(message, max_new_tokens=longest)
                everything, outputs = list(chat.open_session.tokens), reply.stats.output_tokens
                before, stop = len(figures()), list(own.stop_ids)
                found = answer(llm, [everything[:-outputs]], longest, ignore_eos=False, stop_token_ids=stop)
                same.append(found[0].tokens == everything[-outputs:])
                pairs.append((figures_since(before)[0], reply.stats.as_dict()))
    for name in ("attended_fraction", "prefill_cell_density", "prefill_tile_density"):
        mine, theirs = (sum(each[side][name] for each in pairs) / len(pairs) for side in (0, 1))
        print(f"{name} {mine:.4f}, own engine {theirs:.4f}")
    print(f"same answers {sum(same)} of {len(same)}")
    return same, pairs


def figures_since(count: int) -> list[dict[str, Any]]:
    """The figures of the requests since so many, which ``len(figures())`` said."""
    return figures()[count:]
