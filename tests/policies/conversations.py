"""Conversations of several turns with tiny random models, under any two policies."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from transformers import PreTrainedModel

from loopserve.core.engine.engine import TokenEngine
from loopserve.core.engine.session import Session
from loopserve.core.stack.stack import resolve_stack
from loopserve.models.bridge import IMPLEMENTATION, TransformersModel
from loopserve.models.layers import set_implementation
from loopserve.models.tiny import VOCABULARY, tiny_model
from tests.policies.small import registered

FAMILIES = ("llama", "gemma2")  # full attention only; every other layer sliding, with softcaps
TURNS = (41, 3, 29)
ANSWER = 6
DENSE, FULL = {"policy": "dense"}, {"policy": "full"}


@cache
def model(family: str) -> PreTrainedModel:
    found = tiny_model(family)
    set_implementation(found, IMPLEMENTATION)
    return found


def engine(family: str, prefill: dict[str, Any], decode: dict[str, Any], **options: Any) -> TokenEngine:
    stack = resolve_stack({"prefill": prefill, "decode": decode}, registered())
    return TokenEngine(TransformersModel(model(family)), stack, **options)


def prompts(seed: int, turns: tuple[int, ...] = TURNS) -> list[list[int]]:
    source = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCABULARY, (count,), generator=source, device="cpu").tolist() for count in turns]


def answers(
    served: TokenEngine, session: Session, seed: int = 0, turns: tuple[int, ...] = TURNS, answer: int = ANSWER
) -> Iterator[torch.Tensor]:
    """The logits ``[answer, vocabulary]`` of each turn, one turn at a time, greedily answered."""
    for prompt in prompts(seed, turns):
        seen: list[torch.Tensor] = []

        def choose(logits: torch.Tensor, seen: list[torch.Tensor] = seen) -> int:
            seen.append(logits)
            return int(logits.argmax())

        list(served.generate(session, prompt, choose, max_new_tokens=answer))
        yield torch.stack(seen)


def conversation(served: TokenEngine, session: Session | None = None, seed: int = 0) -> torch.Tensor:
    """The logits of all turns, one behind the other."""
    return torch.cat(list(answers(served, session or served.session(), seed)))
