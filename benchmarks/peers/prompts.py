"""Token ids of the conversations: natural text for SmolLM2, numbers at random for a model with random weights; both models' folders."""

from __future__ import annotations

import random
import shutil
from dataclasses import dataclass
from pathlib import Path

from loopserve.models.catalog import CATALOG, named_directory
from loopserve.models.random import random_llama
from research.evidence_real.texts import text

RANDOM = "random"  # 12 layers, 768 wide, 12 query and 4 KV heads of 64, random weights
QUOTED = 48  # tokens of the passage that a later message ends with
VOCABULARY = 49_152  # SmolLM2's, whose tokenizer the random model gets


@dataclass(frozen=True)
class Case:
    """Describe conversations of one kind: model, tokens of a first message, and how many conversations at once."""

    model: str
    prompt: int
    conversations: int = 1

    @classmethod
    def read(cls, name: str) -> Case:
        """Return the case that ``smollm2:7680`` or ``smollm2:2048x4`` names. Raises ValueError."""
        model, _, size = name.partition(":")
        prompt, _, conversations = size.partition("x")
        return cls(model, int(prompt), int(conversations or 1))

    @property
    def name(self) -> str:
        return f"{self.model}:{self.prompt}" + (f"x{self.conversations}" if self.conversations > 1 else "")


def folders(model: str, cache: Path) -> tuple[Path, Path | None]:
    """Return a model's transformers directory, made at the first use, and the GGUF file that it was made of, if any."""
    if model != RANDOM:
        return named_directory(model), CATALOG[model].gguf
    target = cache / RANDOM
    if not target.exists():
        part = target.with_suffix(".part")
        shutil.rmtree(part, ignore_errors=True)
        shape = {"layers": 12, "hidden": 768, "heads": 12, "kv_heads": 4, "intermediate": 3072}
        random_llama(**shape, vocabulary=VOCABULARY, positions=1 << 16).save_pretrained(part)
        for each in named_directory("smollm2").glob("tokenizer*"):
            shutil.copy(each, part)
        part.rename(target)
    return target, None


def messages(case: Case, new: int, folder: Path) -> list[list[list[int]]]:
    """Return the two messages of each conversation, as token ids.

    A message of text is a piece of it; the later one ends with a passage that stood early in the first, so that what follows from the
    context is the passage's continuation. Conversations hold different pieces.
    """
    if case.model == RANDOM:
        draw = random.Random(case.prompt)
        return [
            [[draw.randrange(VOCABULARY) for _ in range(length)] for length in (case.prompt, new)]
            for _ in range(case.conversations)
        ]
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = [
        token
        for number in range(2)
        for token in tokenizer.encode(text("technical", number), add_special_tokens=False, verbose=False)
    ]
    length = case.prompt + new
    if len(ids) < length * case.conversations:
        raise ValueError(f"{case.name}: the text has {len(ids)} tokens, {length * case.conversations} are needed")
    found = []
    for number in range(case.conversations):
        piece = ids[number * length : (number + 1) * length]
        place = case.prompt // 4
        found.append([piece[: case.prompt], [*piece[case.prompt : -QUOTED], *piece[place : place + QUOTED]]])
    return found
