"""Run the same conversations with one trained model under several stacks, and report figures per turn.

Every stack that compresses gets the same budget: a tenth of the conversation's mean length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from loopserve.api import Engine, load_stack
from loopserve.bench.budget import budget_for, budget_of, uncounted_outputs_of, with_budget
from loopserve.bench.recall import Dialogue, Position, RecallTask, make_dialogues
from loopserve.bench.speed.engine import machine
from loopserve.core.engine.stats import TurnStats
from loopserve.core.errors import ConfigError
from loopserve.core.stack.stack import PolicyStack
from loopserve.models.loading import load

STACKS = ("dense", "loopserve", "loopserve-paper", "snapkv", "streaming_llm")
POSITIONS: tuple[Position, ...] = ("begin", "middle", "end")
ATTENDED = 0.10
_LONGEST_ANSWER = 96
_SHORT = 256  # tokens of a conversation from which on a stack's sparse prefill begins at the latest
_UNCOUNTED_OUTPUTS = 12  # outputs attended besides the budget, mean over a short answer

Progress = Callable[[str, int, int], None]


@dataclass
class Tally:
    """Count correct and asked answers, and collect the statistics of their turns."""

    asked: int = 0
    right: int = 0
    ttft_ms: list[float] = field(default_factory=list)
    stats: TurnStats = field(default_factory=lambda: TurnStats(0))

    def add(self, right: bool, stats: TurnStats) -> None:
        self.asked += 1
        self.right += right
        self.ttft_ms.append(stats.ttft_ms)
        self.stats.merge(stats)

    def as_dict(self) -> dict[str, Any]:
        figures = self.stats.as_dict()
        figures["ttft_ms"] = median(self.ttft_ms) if self.ttft_ms else None
        return {"asked": self.asked, "right": self.right, **figures}


def demo_dialogues(seed: int, tokens: int, turns: int, dialogues: int, keys: Sequence[int] = (1, 2)) -> list[Dialogue]:
    """Return ``dialogues`` held-out conversations for each question position, alternating over the numbers of keys asked."""
    made = []
    for position in POSITIONS:
        for number, count in enumerate(keys):
            share = dialogues // len(keys) + (number < dialogues % len(keys))
            task = RecallTask(tokens=tokens, turns=turns, keys=count, position=position)
            made += make_dialogues(task, share, seed)
    return made


def equal_budget(stack: PolicyStack, tokens: int, turns: int) -> PolicyStack:
    """Return the stack with its decode budget set so that a tenth of dense attention's pairs are attended.

    Conversations of these lengths are read sparsely, whatever the stack's lower limit for it is.
    """
    average = tokens * (turns + 1) / (2 * turns)  # length of the conversation at each answer, for turns of equal length
    try:
        budgeted = with_budget(stack, budget_for(ATTENDED, average, uncounted_outputs_of(stack, _UNCOUNTED_OUTPUTS)))
    except ConfigError as error:
        raise ConfigError(f"a tenth of {tokens} tokens is too small a budget ({error}): raise --tokens") from error
    described = budgeted.describe()
    for each in (described, *described.get("layers", [])):
        if "min_total_tokens" in each.get("prefill", {}):
            each["prefill"]["min_total_tokens"] = min(each["prefill"]["min_total_tokens"], _SHORT)
    return load_stack(described)


def run_demo(
    *,
    stacks: Sequence[str],
    seed: int,
    tokens: int,
    turns: int,
    dialogues: int,
    progress: Progress,
    model: str = "demo",
    dtype: str = "auto",
) -> dict[str, Any]:
    """Run the conversations under every stack. Return figures over all turns, per turn, and per question position of the last turn."""
    work = demo_dialogues(seed, tokens, turns, dialogues)
    loaded, tokenizer = load(model, dtype=dtype)
    result: dict[str, Any] = {}
    budgets = set()
    for name in stacks:
        stack = equal_budget(load_stack(name), tokens, turns)
        budgets |= {budget_of(stack)} - {None}
        engine = Engine(loaded, tokenizer, stack, measure_coverage=True)
        total, per_turn = Tally(), [Tally() for _ in range(turns)]
        per_position = {position: Tally() for position in POSITIONS}
        for count, dialogue in enumerate(work):
            progress(name, count, len(work))
            with engine.session() as chat:
                for index, turn in enumerate(dialogue.turns):
                    reply = chat.send(turn.text, max_new_tokens=_LONGEST_ANSWER)
                    right = reply.text == turn.answer
                    for tally in (total, per_turn[index], per_position[turn.position]):
                        tally.add(right, reply.stats)
        progress(name, len(work), len(work))
        result[name] = {
            **total.as_dict(),
            "turns": [tally.as_dict() for tally in per_turn],
            "positions": {position: tally.as_dict() for position, tally in per_position.items()},
        }
    settings: dict[str, Any] = {"model": model, "seed": seed, "tokens": tokens, "turns": turns, "dialogues": len(work)}
    settings["budget"] = sorted(budgets)
    return {"settings": settings, "machine": machine(), "stacks": result, "summary": summary(result)}


def summary(stacks: dict[str, Any]) -> str:
    """Return one sentence that states the result."""
    parts = []
    for name, figures in stacks.items():
        share = figures["right"] / figures["asked"]
        text = f"{name} answered {share:.0%} right"
        costs = []
        if (cells := figures["prefill_cell_density"]) is not None and cells < 0.999:
            costs.append(f"{cells:.0%} of the prefill's attention cells")
        if (attended := figures["attended_fraction"]) is not None and attended < 0.999:
            read = figures["kv_bytes_per_token"] / figures["dense_kv_bytes_per_token"]
            costs.append(
                f"{attended:.0%} of the KV pairs attended and {read:.0%} of the KV bytes read per output token"
            )
        parts.append(text + (f" with {' and '.join(costs)}" if costs else ""))
    return "Over the same conversations, " + "; ".join(parts) + "."
