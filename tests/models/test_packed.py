"""Several sessions in one forward pass get what each gets alone."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

from loopserve.core.engine.engine import TokenEngine
from loopserve.core.engine.session import Session
from loopserve.core.engine.turn import Turn
from loopserve.models.tiny import FAMILIES, VOCABULARY, tiny_model
from tests.models.conftest import GreedySteps, engine_for

STACKS = {
    "dense": "dense",
    "selecting": {
        "prefill": {"policy": "loopserve", "alpha": 0.9},
        "decode": {"policy": "snapkv", "budget": 16, "window": 4, "sink_tokens": 1, "recent_window": 4},
    },
}
LENGTHS = ((61, 9), (23, 40), (7, 3))  # per session: tokens of its two turns
ANSWER = 6


def prompt(session: int, turn: int) -> list[int]:
    generator = torch.Generator().manual_seed(10 * session + turn)
    return torch.randint(3, VOCABULARY, (LENGTHS[session][turn],), generator=generator).tolist()


def alone(engine: TokenEngine) -> list[torch.Tensor]:
    """Per session, the logits of its two turns, each run by itself."""
    found = []
    for number in range(len(LENGTHS)):
        session, seen = engine.session(), GreedySteps()
        for turn in range(2):
            list(engine.generate(session, prompt(number, turn), seen, max_new_tokens=ANSWER))
        found.append(torch.stack(seen.logits))
    return found


def together(engine: TokenEngine) -> tuple[list[torch.Tensor], int]:
    """The same turns, prefill pieces of some in the passes of others' decode steps. Returns the passes with more than one phase."""
    sessions: list[Session] = [engine.session() for _ in LENGTHS]
    seen = [GreedySteps() for _ in LENGTHS]
    running: dict[int, Turn] = {}
    begun = [0] * len(LENGTHS)
    mixed = passes = 0
    while running or any(turns < 2 for turns in begun):
        for number, session in enumerate(sessions):  # session n joins n passes later than the one before it
            if number not in running and begun[number] < 2 and passes >= 2 * number:
                tokens = prompt(number, begun[number])
                running[number] = engine.begin(session, tokens, seen[number], max_new_tokens=ANSWER)
                begun[number] += 1
        waiting = {turn.waiting > 0 for turn in running.values()}
        mixed += len(waiting) > 1
        engine.run_pass(list(running.values()), [30] * len(running))
        passes += 1
        for number, turn in list(running.items()):
            assert turn.error is None
            if turn.finished:
                del running[number]
    return [torch.stack(each.logits) for each in seen], mixed


def engine(model: PreTrainedModel, stack: str) -> TokenEngine:
    return engine_for(model, STACKS[stack])


@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_equals_alone(family: str, stack: str) -> None:
    if family == "mistral_window" and stack != "dense":
        pytest.skip("all its layers slide, so no policy acts")
    served = engine(tiny_model(family), stack)
    # Prefill in pieces as the shared passes have them: a sparse pattern depends on where a piece ends.
    found, mixed = together(served)
    assert mixed > 0
    expected = alone(served) if stack == "dense" else in_pieces(served)
    for packed, solo in zip(found, expected, strict=True):
        assert torch.equal(packed.argmax(-1), solo.argmax(-1))
        torch.testing.assert_close(packed, solo, atol=1e-4, rtol=1e-4)


def in_pieces(engine: TokenEngine) -> list[torch.Tensor]:
    """Per session, the logits of its turns alone, with prefill pieces of at most 30 tokens."""
    found = []
    for number in range(len(LENGTHS)):
        session, seen = engine.session(), GreedySteps()
        for turn in range(2):
            running = engine.begin(session, prompt(number, turn), seen, max_new_tokens=ANSWER)
            while not running.finished:
                engine.run_pass([running], [30])
        found.append(torch.stack(seen.logits))
    return found
