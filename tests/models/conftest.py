"""Two turns of one conversation, run by plain transformers and by our engine, logits and all."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

from loopserve.api import load_stack
from loopserve.core.engine.engine import TokenEngine
from loopserve.core.engine.session import Session
from loopserve.models.bridge import IMPLEMENTATION, TransformersModel
from loopserve.models.layers import cache_keyword, set_implementation
from loopserve.models.tiny import VOCABULARY, tiny_model

TURNS = (61, 37)  # tokens each turn adds; both reach beyond the tiny models' windows
ANSWER = 9


@dataclass
class GreedySteps:
    """Choose greedily; keep tokens and logits ``[steps, vocabulary]`` of every step of a conversation."""

    tokens: list[int] = field(default_factory=list)
    logits: list[torch.Tensor] = field(default_factory=list)

    def __call__(self, logits: torch.Tensor) -> int:
        self.logits.append(logits)
        self.tokens.append(int(logits.argmax()))
        return self.tokens[-1]

    def difference(self, other: GreedySteps) -> float:
        return float((torch.stack(self.logits) - torch.stack(other.logits)).abs().max())


def prompts(seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCABULARY, (count,), generator=generator).tolist() for count in TURNS]


def steps_by_transformers(model: PreTrainedModel) -> GreedySteps:
    """Greedy, with transformers' own attention and cache."""
    steps, cache, seen = GreedySteps(), DynamicCache(config=model.config), 0
    waiting: list[int] = []
    with torch.no_grad():
        for prompt in prompts():
            waiting += prompt
            for _ in range(ANSWER):
                positions = torch.arange(seen, seen + len(waiting))[None]
                output = model(torch.tensor([waiting]), position_ids=positions, **{cache_keyword(model): cache})
                seen += len(waiting)
                waiting = [steps(output.logits[0, -1])]
    return steps


def steps_by_engine(engine: TokenEngine, session: Session | None = None) -> GreedySteps:
    """The same conversation through our loop."""
    steps = GreedySteps()
    session = session or engine.session()
    for prompt in prompts():
        list(engine.generate(session, prompt, steps, max_new_tokens=ANSWER))
    return steps


def steps_by_one_pass(model: PreTrainedModel, tokens: list[int]) -> GreedySteps:
    """The logits of a conversation with these answers, computed in one pass without a cache, by transformers' own attention."""
    steps, row, read = GreedySteps(), [], iter(tokens)
    places = []
    for prompt in prompts():
        row += prompt
        for _ in range(ANSWER):
            places.append(len(row) - 1)
            row.append(next(read))
    with torch.no_grad():
        logits = model(torch.tensor([row]), use_cache=False).logits[0]
    for place in places:
        steps(logits[place])
    return steps


def engine_for(model: PreTrainedModel, stack: object, **options: int) -> TokenEngine:
    set_implementation(model, IMPLEMENTATION)
    return TokenEngine(TransformersModel(model), load_stack(stack), **options)  # type: ignore[arg-type]


@pytest.fixture
def llama() -> PreTrainedModel:
    return tiny_model("llama")
