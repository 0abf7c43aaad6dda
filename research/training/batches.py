"""Dialogues as tensors: word ids, positions with skips, the rows that have a loss, and what they should predict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor

from loopserve.bench.recall import Layout, TurnLayout
from loopserve.bench.vocabulary import CODE_WORDS, GRAMMAR, PLACES, vocabulary
from research.training.model import AttentionTarget

SPECIAL_WORDS = ("<pad>", "<unk>", "<bos>", "<user>", "<assistant>", "<eot>")
WORDS = (*SPECIAL_WORDS, *vocabulary())
IDS = {word: index for index, word in enumerate(WORDS)}
KINDS = torch.tensor([0 if w in SPECIAL_WORDS else 1 if w in PLACES else 2 if w in CODE_WORDS else 3 for w in WORDS])
TALK = torch.tensor([kind == 3 and word not in GRAMMAR for word, kind in zip(WORDS, KINDS.tolist(), strict=True)])
LOOKAHEAD = 6
IGNORE = -100

# Heads that the auxiliary loss teaches; 0 and 2 of a layer read different KV heads.
OWNER_HEAD = (0, 0)
PREVIOUS_HEAD = (0, 2)
SOURCE_HEAD = (1, 0)
FORESIGHT_HEADS = ((2, 0), (2, 2))
"""Look at the first and the second word of the code that comes next in the answer, before its place is written."""


@dataclass(frozen=True)
class Batch:
    """ids, positions: [batch, length]; rows: [batch, count]; wanted: [batch, count, 1 + 5 + 6] int64, -100 ignored.

    wanted[..., 0] is the next word, 1-5 the words two to six ahead (answer rows), 6-11 the code of a place named in the
    question (question rows). answers: (dialogue, turn, first row, end row) of each answer.
    """

    ids: Tensor
    positions: Tensor
    rows: Tensor
    wanted: Tensor
    answers: list[tuple[int, int, int, int]]
    targets: list[AttentionTarget]


def collate(
    layouts: Sequence[Layout], rng: Random, skip_share: float = 0.0, longest_skip: int = 6000, noise: float = 0.0
) -> Batch:
    """Pad the dialogues into one batch; `skip_share` of the batches get gaps in their position ids.

    `noise` is the share of small-talk words replaced by <unk> or by any other word, since a person who chats uses words
    that the model does not know and names places that have no code.
    """
    ids = _padded([[IDS[word] for word in layout.words] for layout in layouts], 0)
    if noise:
        ids = _with_noise(ids, noise, torch.Generator().manual_seed(rng.getrandbits(32)))
    rows, wanted, answers = [], [], []
    owners: list[tuple[list[int], list[int]]] = []
    sources: list[tuple[list[int], list[int]]] = []
    for index, layout in enumerate(layouts):
        words = [IDS[word] for word in layout.words]
        mine: list[int] = []
        ahead: list[list[int]] = []
        source_rows: list[int] = []
        source_columns: list[int] = []
        for number, turn in enumerate(layout.turns):
            answers.append((index, number, len(mine), len(mine) + turn.answer_stop - turn.answer_start + 1))
            for row in range(turn.answer_start - 1, turn.answer_stop):
                next_words = words[row + 1 : min(row + 1 + LOOKAHEAD, turn.answer_stop + 1)]
                mine.append(row)
                ahead.append(next_words + [IGNORE] * (2 * LOOKAHEAD - len(next_words)))
            for row, key in zip(turn.question_keys, turn.turn.keys, strict=False):
                fact = layout.facts[key]
                if fact.start < row:  # what is stated after the question cannot be known at the question
                    code = words[fact.start + 2 : fact.start + 3 + len(fact.value)][:LOOKAHEAD]
                    mine.append(row)
                    ahead.append([IGNORE] * LOOKAHEAD + code + [IGNORE] * (LOOKAHEAD - len(code)))
            source_rows.extend(range(turn.answer_start - 1, turn.answer_stop))
            source_columns.extend(turn.sources)
        rows.append(mine)
        wanted.append(ahead)
        sources.append((source_rows, source_columns))
        owners.append(_owners(layout, rng))
    count = max(len(mine) for mine in rows)
    for mine, ahead in zip(rows, wanted, strict=True):
        missing = count - len(mine)
        mine.extend([0] * missing)
        ahead.extend([[IGNORE] * (2 * LOOKAHEAD)] * missing)
    foresight = [_foresight(layout, number) for layout in layouts for number in range(len(FORESIGHT_HEADS))]
    owner_rows, owner_columns = _padded([o[0] for o in owners], 0), _padded([o[1] for o in owners], -1)
    return Batch(
        ids=ids,
        positions=_positions(layouts, ids.shape[1], rng, skip_share, longest_skip),
        rows=torch.tensor(rows),
        wanted=torch.tensor(wanted),
        answers=answers,
        targets=[
            AttentionTarget(*OWNER_HEAD, owner_rows, owner_columns),
            AttentionTarget(*PREVIOUS_HEAD, owner_rows, torch.where(owner_columns < 0, owner_columns, owner_rows - 1)),
            AttentionTarget(*SOURCE_HEAD, _padded([s[0] for s in sources], 0), _padded([s[1] for s in sources], -1)),
            *(
                AttentionTarget(
                    *head,
                    _padded([rows for rows, _ in foresight[number :: len(FORESIGHT_HEADS)]], 0),
                    _padded([columns for _, columns in foresight[number :: len(FORESIGHT_HEADS)]], -1),
                )
                for number, head in enumerate(FORESIGHT_HEADS)
            ),
        ],
    )


def _with_noise(ids: Tensor, share: float, generator: torch.Generator) -> Tensor:
    hit = TALK[ids] & (torch.rand(ids.shape, generator=generator) < share)
    other = torch.randint(len(SPECIAL_WORDS), len(WORDS), ids.shape, generator=generator)
    other[torch.rand(ids.shape, generator=generator) < 0.7] = IDS["<unk>"]
    return torch.where(hit, other, ids)


def _owners(layout: Layout, rng: Random, most: int = 96) -> tuple[list[int], list[int]]:
    """Words and the place each belongs to: in facts, answers and questions; a sample of at most `most` pairs."""
    pairs: list[tuple[int, int]] = []
    for fact in layout.facts.values():
        pairs.extend((row, fact.start) for row in range(fact.start + 1, fact.start + 3 + len(fact.value)))
    for turn in layout.turns:
        pairs.extend((turn.answer_start + offset, owner) for offset, owner in enumerate(turn.owners) if turn.turn.keys)
        pairs.extend(_question_pairs(turn))
    if len(pairs) > most:
        pairs = rng.sample(pairs, most)
    return [row for row, _ in pairs], [column for _, column in pairs]


def _foresight(layout: Layout, number: int) -> tuple[list[int], list[int]]:
    """Rows that should look ahead, and where word `number` of the code that comes next was stated.

    The rows are a place named in the question (if its fact was stated before), the word before an answer's place, and the
    place itself.
    """
    pairs: list[tuple[int, int]] = []
    for turn in layout.turns:
        if not turn.turn.keys:
            continue
        named = zip(turn.question_keys, turn.turn.keys, strict=False)
        seen = [(row, layout.facts[key]) for row, key in named if layout.facts[key].start < row]
        for owner in dict.fromkeys(turn.owners):
            fact = layout.facts[layout.words[owner]]
            seen += [(owner - 1, fact), (owner, fact)]
        pairs.extend((row, fact.start + 2 + number) for row, fact in seen if number < len(fact.value))
    return [row for row, _ in pairs], [column for _, column in pairs]


def _question_pairs(turn: TurnLayout) -> list[tuple[int, int]]:
    """Each asked place belongs to the one asked before it, the first to `what`, the question mark to the last."""
    marks = turn.question_keys
    if not marks:
        return []
    what = marks[0] - 5  # both `what is the code of` and `what are the codes of` are five words
    return list(zip(marks, [what, *marks[:-1]], strict=True))


def _positions(layouts: Sequence[Layout], length: int, rng: Random, skip_share: float, longest: int) -> Tensor:
    """[batch, length] position ids; with skips, random gaps after facts and turns stretch a short dialogue."""
    steps = torch.ones(len(layouts), length, dtype=torch.int64)
    steps[:, 0] = 0
    if rng.random() < skip_share:
        for index, layout in enumerate(layouts):
            room = int(longest * rng.random() ** 2)
            places = [fact.start + 3 + len(fact.value) for fact in layout.facts.values()]
            places += [turn.text_start - 1 for turn in layout.turns[1:]]
            chosen = rng.sample(places, min(len(places), rng.randint(1, 8)))
            cuts = sorted(rng.random() for _ in chosen)
            for place, low, high in zip(chosen, [0.0, *cuts[:-1]], cuts, strict=True):
                if place < length:
                    steps[index, place] += int(room * (high - low))
    return steps.cumsum(1)


def _padded(lists: list[list[int]], fill: int) -> Tensor:
    width = max(1, *(len(values) for values in lists))
    return torch.tensor([values + [fill] * (width - len(values)) for values in lists])
