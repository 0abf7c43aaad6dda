"""Hold one conversation about chapters of a novel with a pretrained model under several stacks, and compare the answers.

The user states facts between the paragraphs of the chapters and asks for them later: in the same turn, in the next one, and after other
chapters. The questions were chosen by the dense answers alone: a question is kept if dense attention answers it right and no other
number is about as likely. Each stack holds the whole conversation by itself, so that its own earlier answers are part of its history.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from loopserve.api import Engine, StackLike, load_stack
from loopserve.bench.budget import budget_for, budget_of, uncounted_outputs_of, with_budget
from loopserve.bench.speed.engine import machine
from loopserve.chat_session import Reply
from loopserve.core.engine.stats import TurnStats
from loopserve.core.errors import ConfigError
from loopserve.models.loading import load

STACKS = ("dense", "loopserve", "loopserve-paper", "snapkv", "quest", "streaming_llm")
MODEL = "smollm2"
ATTENDED = 0.05
REFERENCE = "dense"
_LONGEST_ANSWER = 32

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class BookTurn:
    """Hold one message of the user, its question, the text that a right answer contains, and the turn that states the fact (from 1)."""

    message: str
    question: str
    expected: str
    stated_in: int


# Turn by turn: the file of a chapter or None, facts with their places among its paragraphs (0 to 1), the question, and its answer.
_PLAN: tuple[tuple[str | None, tuple[tuple[float, str], ...], str, str], ...] = (
    (
        "chapter_07.txt",
        ((0.3, "The magic number of the Pequod is 48213."), (0.7, "The magic number of the harpoon is 70594.")),
        "What is the magic number of the Pequod?",
        "48213",
    ),
    (None, (), "What is the magic number of the harpoon?", "70594"),
    (
        "chapter_12.txt",
        ((0.3, "The magic number of the lantern is 31876."),),
        "What is the magic number of the lantern?",
        "31876",
    ),
    (None, (), "What is the magic number of the Pequod?", "48213"),
    (
        "chapter_14.txt",
        ((0.7, "The magic number of the compass is 95042."),),
        "What is the magic number of the compass?",
        "95042",
    ),
    (None, (), "What is the magic number of the lantern?", "31876"),
)


def book_turns() -> list[BookTurn]:
    """Return the turns of the conversation. The chapters and facts have about 3,500 tokens."""
    folder = files("loopserve.bench") / "data" / "moby_dick"
    stated: dict[str, int] = {}
    turns = []
    for number, (chapter, facts, question, expected) in enumerate(_PLAN, 1):
        parts = [question]
        if chapter is not None:
            parts.insert(0, _with_facts((folder / chapter).read_text(encoding="utf-8").strip(), facts))
        for _, fact in facts:
            stated[fact] = number
        source = next(turn for fact, turn in stated.items() if expected in fact)
        turns.append(BookTurn("\n\n".join(parts), question, expected, source))
    return turns


def _with_facts(text: str, facts: Sequence[tuple[float, str]]) -> str:
    """Return a text with facts as paragraphs of their own. place: share of the paragraphs before a fact."""
    paragraphs = text.split("\n\n")
    count = len(paragraphs)
    for place, fact in sorted(facts, reverse=True):
        paragraphs.insert(max(1, round(place * count)), fact)
    return "\n\n".join(paragraphs)


def run_book_demo(
    *, stacks: Sequence[StackLike], progress: Progress, model: str = MODEL, dtype: str = "auto"
) -> dict[str, Any]:
    """Hold the conversation under ``dense`` and under every stack. Return answers and figures, in all and per turn.

    Every stack that compresses gets the same budget: 5 % of the pairs that dense attends to. Prefill is computed by each stack on
    its own, so that the times can be compared. Raises ModelError for a model that cannot be loaded, ConfigError for a stack
    that cannot serve it.
    """
    turns = book_turns()
    loaded, tokenizer = load(model, dtype=dtype)
    resolved = [load_stack(each) for each in stacks]
    others = [each for each in resolved if each.name != REFERENCE]
    found: dict[str, Any] = {}
    dense = _converse(Engine(loaded, tokenizer, REFERENCE), REFERENCE, turns, progress)
    length, outputs = _mean_length(dense)
    found[REFERENCE] = _figures(turns, dense, dense)
    budgets: set[int] = set()
    for stack in others:
        try:
            equal = with_budget(stack, budget_for(ATTENDED, length, uncounted_outputs_of(stack, outputs)))
        except ConfigError as error:
            raise ConfigError(f"{stack.name}: 5 % of {length:,.0f} tokens is too small a budget ({error})") from error
        budget = budget_of(equal)
        if budget is not None:
            budgets.add(budget)
        held = _converse(Engine(loaded, tokenizer, equal), stack.name, turns, progress)
        found[stack.name] = _figures(turns, held, dense)
    settings = {
        "conversation": "moby_dick",
        "model": model,
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "tokens": dense[-1].reply.usage.reused_tokens + dense[-1].reply.usage.prompt_tokens,
        "turns": len(turns),
        "attended": ATTENDED,
        "budget": sorted(budgets),
        "questions": [
            {"question": each.question, "expected": each.expected, "stated_in": each.stated_in} for each in turns
        ],
    }
    return {"settings": settings, "machine": machine(), "stacks": found, "summary": _summary(found)}


@dataclass(frozen=True)
class _Answer:
    reply: Reply
    seconds: float


def _converse(engine: Engine, name: str, turns: Sequence[BookTurn], progress: Progress) -> list[_Answer]:
    answers = []
    with engine.session() as chat:
        for number, turn in enumerate(turns):
            progress(name, number, len(turns))
            start = time.perf_counter()
            reply = chat.send(turn.message, max_new_tokens=_LONGEST_ANSWER, stop=["\n"])
            answers.append(_Answer(reply, time.perf_counter() - start))
    progress(name, len(turns), len(turns))
    return answers


def _mean_length(answers: Sequence[_Answer]) -> tuple[float, float]:
    """Return the tokens that a dense decode step attends to and those of them that are outputs, means over all steps."""
    lengths = outputs = steps = 0.0
    for each in answers:
        usage, count = each.reply.usage, each.reply.stats.decode_steps
        prompt = usage.reused_tokens + usage.prompt_tokens
        lengths += count * (prompt + (count + 1) / 2)
        outputs += count * (count + 1) / 2
        steps += count
    return lengths / steps, outputs / steps


def _figures(turns: Sequence[BookTurn], answers: Sequence[_Answer], dense: Sequence[_Answer]) -> dict[str, Any]:
    total, each_turn = TurnStats(0), []
    for turn, own, reference in zip(turns, answers, dense, strict=True):
        total.merge(own.reply.stats)
        each_turn.append(
            {
                **own.reply.stats.as_dict(),
                "answer": own.reply.text,
                "asked": 1,
                "right": int(is_right(own.reply.text, turn.expected)),
                "same": int(own.reply.text == reference.reply.text),
                "seconds": own.seconds,
            }
        )
    sums = {name: sum(each[name] for each in each_turn) for name in ("asked", "right", "same", "seconds", "ttft_ms")}
    return {**total.as_dict(), **sums, "turns": each_turn}


def is_right(answer: str, expected: str) -> bool:
    """Return whether an answer contains the expected text as whole words, in upper or lower case."""
    return re.search(rf"(?<!\w){re.escape(expected)}(?!\w)", answer, re.IGNORECASE) is not None


def _summary(stacks: dict[str, Any]) -> str:
    parts = [
        f"{name} gave {row['same']} of {row['asked']} answers as dense did, reading {row['attended_fraction']:.1%} of the KV pairs"
        for name, row in stacks.items()
        if name != REFERENCE
    ]
    return "; ".join(parts) + ("." if parts else "")
