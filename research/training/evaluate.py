"""Held-out accuracy of an exported checkpoint: `python -m research.training.evaluate FOLDER --name NAME`.

Loads the folder with transformers alone, so what is measured is what is shipped. An answer counts when every word of it
and its <eot> is the arg-max given the right words before it: the same as greedy decoding giving the whole answer.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from loopserve.bench.recall import HELD_OUT_SEED, Layout, Position, RecallTask, lay_out
from research.training.batches import IDS

RESULTS = Path(".training")


@dataclass(frozen=True)
class Outcome:
    """One asked question of a held-out dialogue."""

    kind: str
    tokens: int
    position: str
    keys: int
    distance: int
    right: bool


def outcomes(model: Any, kind: str, task: RecallTask, count: int, seed: int) -> Iterator[Outcome]:
    """Every question of `count` dialogues, each dialogue in one forward pass."""
    for index in range(count):
        layout = lay_out(task, seed + index)
        wanted = torch.tensor([IDS[word] for word in layout.words])
        predicted = _predict(model, wanted, layout)
        for turn in layout.turns:
            answer = slice(turn.answer_start, turn.answer_stop + 1)
            yield Outcome(
                kind=kind if turn.turn.keys else f"{kind}, nothing asked",
                tokens=task.tokens,
                position=turn.turn.position,
                keys=len(turn.turn.keys),
                distance=max(turn.turn.distances, default=0),
                right=bool((predicted[answer] == wanted[answer]).all()),
            )


@torch.no_grad()
def _predict(model: Any, ids: torch.Tensor, layout: Layout) -> torch.Tensor:
    """The arg-max word at every index, given the words before it (index 0 holds nothing of use)."""
    hidden = model.model(ids[None]).last_hidden_state[0]
    predicted = torch.zeros_like(ids)
    for turn in layout.turns:
        rows = slice(turn.answer_start - 1, turn.answer_stop)
        predicted[turn.answer_start : turn.answer_stop + 1] = model.lm_head(hidden[rows]).argmax(-1)
    return predicted


PLAIN = "3 equal turns"
_ORDER: dict[object, int] = {"begin": 0, "middle": 1, "end": 2}


def tasks(scale: float) -> Iterator[tuple[str, RecallTask, int]]:
    """Return the tasks, and how many dialogues of each."""
    positions: tuple[Position, ...] = ("begin", "middle", "end")
    for tokens, count in ((512, 16), (1024, 12), (2048, 20), (3000, 8), (4096, 5)):
        for keys in (1, 2, 3, 4, 5):
            for position in positions:
                task = RecallTask(tokens=tokens, turns=3, keys=keys, position=position)
                yield PLAIN, task, max(2, round(count * scale))
    chat = RecallTask(tokens=1024, turns=10, keys=(1, 2), uneven=True, silent_share=0.1, again_share=0.1)
    yield "10 uneven turns, 1-2 keys", chat, max(2, round(30 * scale))
    for chain in (2, 3):
        task = RecallTask(tokens=1024, turns=3, keys=1, chain=chain)
        yield f"3 turns, 1 key kept in {chain - 1} other place(s)", task, max(2, round(20 * scale))


def table(found: list[Outcome], row: str, column: str) -> list[str]:
    """Markdown: share of right answers (and how many were asked) by two fields of Outcome."""
    cells: dict[object, dict[object, list[bool]]] = defaultdict(lambda: defaultdict(list))
    for outcome in found:
        cells[getattr(outcome, row)][getattr(outcome, column)].append(outcome.right)
    columns = sorted({key for by in cells.values() for key in by}, key=lambda key: (_ORDER.get(key, 0), str(key)))
    lines = [f"| {row} | " + " | ".join(f"{column} {key}" for key in columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for key, by in cells.items():
        shown = [f"{100 * sum(by[c]) / len(by[c]):.1f} % ({len(by[c])})" if by[c] else "" for c in columns]
        lines.append(f"| {key} | " + " | ".join(shown) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--name", required=True, help="the report is written to .training/NAME.md")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the dialogues to run")
    options = parser.parse_args()
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    model: Any = AutoModelForCausalLM.from_pretrained(options.folder, dtype=torch.float32, attn_implementation="sdpa")
    start, found, seed = time.monotonic(), list[Outcome](), HELD_OUT_SEED + 1_000_000
    for kind, task, count in tasks(options.scale):
        found.extend(outcomes(model, kind, task, count, seed))
        seed += count
    everything, found = found, [outcome for outcome in found if outcome.kind == PLAIN]
    few = [outcome for outcome in found if outcome.keys <= 2]
    lines = [
        f"{len(everything)} questions of held-out dialogues in {time.monotonic() - start:.0f} s.",
        "",
        "By length (words in the dialogue, 3 equal turns) and position of the question, one and two keys:",
        "",
        *table(few, "tokens", "position"),
        "",
        "By length and number of keys:",
        "",
        *table(found, "tokens", "keys"),
        "",
        "By length and distance (how many turns back the oldest of the asked facts was stated), one to three keys:",
        "",
        *table([outcome for outcome in found if outcome.keys <= 3], "tokens", "distance"),
        "",
        "Other kinds of dialogue, at 1,024 words:",
        "",
        *table([outcome for outcome in everything if outcome.kind != PLAIN], "kind", "tokens"),
    ]
    (RESULTS / f"{options.name}.md").write_text("\n".join(lines) + "\n")
    (RESULTS / f"{options.name}.json").write_text(json.dumps([vars(outcome) for outcome in everything]))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
