"""Generate multi-turn recall dialogues: facts among small talk, one question per turn, answers that list the facts.

    user       the code of lisbon is amber falcon river . we had soup for lunch today . what is the code of lisbon ?
    assistant  lisbon is amber falcon river .

The question is at the begin, in the middle or at the end of the turn's text, and may ask for facts of earlier turns.
Codes are drawn anew for every dialogue, so an answer can only come from the context. A token is a word: the module
depends on no model and no tokenizer. Training uses seeds below `HELD_OUT_SEED`, evaluation the others.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random
from typing import Literal

from loopserve.bench.vocabulary import CODE_WORDS, PLACES, SLOTS, SMALL_TALK

Position = Literal["begin", "middle", "end"]

HELD_OUT_SEED = 1_000_000_000
"""Seeds from here on are held out: the training script never draws one (asserted there)."""

MARKERS_PER_TURN = 3  # <user>, <assistant>, <eot>; one <bos> opens the dialogue
ACKNOWLEDGEMENT = ("ok", ".")
LIST_ALL = ("what", "are", "all", "the", "new", "codes", "?")
_POSITIONS: tuple[Position, ...] = ("begin", "middle", "end")
_SHORTEST_SENTENCE = min(len(sentence.split()) for sentence in SMALL_TALK)


@dataclass(frozen=True)
class Turn:
    """Hold one exchange. `distances[i]` is the number of turns since the code of `keys[i]` was stated (0: in this turn).

    A turn without a question has an empty question, no keys, and the answer `ok .`.
    """

    text: str
    answer: str
    question: str
    position: Position
    keys: tuple[str, ...]
    distances: tuple[int, ...]


@dataclass(frozen=True)
class Dialogue:
    """Hold the turns of one conversation and the seed that made it."""

    turns: tuple[Turn, ...]
    seed: int


@dataclass(frozen=True)
class RecallTask:
    """Hold the parameters of a dialogue; the seed determines the rest.

    Raises ValueError for values that no dialogue can meet.
    """

    tokens: int = 2048
    """Length of the whole dialogue in words, role markers and answers included; met to within a few words."""
    turns: int = 3
    keys: int | tuple[int, int] = 2
    """Places asked for in a question; a pair draws each question's number uniformly, both ends included."""
    position: Literal["begin", "middle", "end", "mixed"] = "mixed"
    chain: int = 1
    """Facts per asked place: 1 is a plain code; at 2 `the code of a is kept in b .` leads on to b's code, and so on."""
    chain_share: float = 1.0
    """Share of the asked places that are chains, when `chain` is above 1."""
    fact_share: float = 0.4
    """Share of a turn's words that stand in facts; the rest is small talk."""
    code_words: tuple[int, int] = (1, 4)
    """Fewest and most words of a code."""
    uneven: bool = False
    """Turns of random lengths (some no more than a question) instead of equal ones."""
    silent_share: float = 0.0
    """Share of the turns that ask nothing."""
    again_share: float = 0.0
    """Share of the asked places that an earlier question asked for already; at 0 no place is asked for twice."""
    distance: int | None = None
    """Number of turns since every asked fact was stated, limited by the turns and facts there are; None draws it per place."""
    list_all: Literal["no", "named", "unnamed"] = "no"
    """Each turn states `keys` facts and no more, and asks for all, naming the places or not; the answer goes in the order stated."""

    def __post_init__(self) -> None:
        low, high = self.key_range
        if not 1 <= low <= high:
            raise ValueError(f"keys must be at least 1, got {self.keys}")
        if self.turns < 1 or self.chain < 1:
            raise ValueError(f"turns and chain must be at least 1, got {self.turns} and {self.chain}")
        if not 1 <= self.code_words[0] <= self.code_words[1]:
            raise ValueError(f"code_words must be a range from at least 1, got {self.code_words}")
        if self.turns * high * self.chain > len(PLACES):
            raise ValueError(f"more than {len(PLACES)} places would be asked for")
        if self.distance is not None and (self.distance < 0 or self.chain > 1):
            raise ValueError("distance must be at least 0 and goes with chain 1")
        if self.lists and (self.chain > 1 or self.distance or self.again_share or self.silent_share):
            raise ValueError(
                "list_all asks for what its own turn states: no chain, distance, again_share or silent_share"
            )

    @property
    def lists(self) -> bool:
        return self.list_all != "no"

    @property
    def key_range(self) -> tuple[int, int]:
        return (self.keys, self.keys) if isinstance(self.keys, int) else self.keys


@dataclass
class Fact:
    """Hold one stated fact: `the code of key is value .`; `leads_to` is the next place if the value is `kept in place`."""

    key: str
    value: tuple[str, ...]
    turn: int
    leads_to: str | None = None
    start: int = -1
    """Index of the key's word in the dialogue; the value starts two words later."""

    @property
    def words(self) -> tuple[str, ...]:
        return ("the", "code", "of", self.key, "is", *self.value, ".")


@dataclass
class TurnLayout:
    """Hold the positions of one turn's parts, as indices into the dialogue's words."""

    turn: Turn
    text_start: int
    question_keys: list[int]
    """Index of each asked place inside the question, then of the question mark; empty without a question."""
    answer_start: int
    """Index of the answer's first word; the word before it is <assistant>."""
    answer_stop: int
    """Index of the <eot> after the answer."""
    sources: list[int]
    """For every answer word and <eot>: index of the earlier word that it repeats, or -1 where none states it."""
    owners: list[int]
    """For every answer word: index of the place (in the answer) whose sentence it belongs to."""


@dataclass
class Layout:
    """Hold a dialogue as one row of words with the position of every part, for training and tests."""

    words: list[str] = field(default_factory=list)
    facts: dict[str, Fact] = field(default_factory=dict)
    turns: list[TurnLayout] = field(default_factory=list)


def make_dialogue(task: RecallTask, seed: int) -> Dialogue:
    """Return the dialogue of this task and seed; equal arguments give equal dialogues."""
    return Dialogue(tuple(part.turn for part in lay_out(task, seed).turns), seed)


def make_dialogues(task: RecallTask, count: int, seed: int) -> list[Dialogue]:
    """Return `count` dialogues with the seeds `seed`, `seed + 1`, ..."""
    return [make_dialogue(task, seed + index) for index in range(count)]


def lay_out(task: RecallTask, seed: int) -> Layout:
    """Build a dialogue turn by turn and record the position of every part."""
    return _Writer(task, Random(seed)).write()


class _Writer:
    """Write one dialogue. `unasked` holds, per turn, the facts that were stated and not yet asked for."""

    def __init__(self, task: RecallTask, rng: Random) -> None:
        self.task = task
        self.rng = rng
        self.layout = Layout(words=["<bos>"])
        self.places = rng.sample(PLACES, len(PLACES))
        self.unasked: list[list[Fact]] = []
        self.asked: list[list[Fact]] = []

    def write(self) -> Layout:
        for turn, stop in enumerate(self._turn_stops()):
            self._write_turn(turn, stop)
        return self.layout

    def _turn_stops(self) -> list[int]:
        """Return the dialogue length to reach at the end of each turn."""
        count = self.task.turns
        weights = [self.rng.random() ** 2 + 0.02 if self.task.uneven else 1.0 for _ in range(count)]
        total, reached, stops = sum(weights), 0.0, []
        for weight in weights:
            reached += weight
            stops.append(round(1 + (self.task.tokens - 1) * reached / total))
        return stops

    def _write_turn(self, turn: int, stop: int) -> None:
        rng, words = self.rng, self.layout.words
        new: list[Fact] = []
        chains = [] if rng.random() < self.task.silent_share else self._choose(turn, stop - len(words), new)
        keys = [chain[0].key for chain in chains]
        question = self._question(keys)
        answer_length = sum(2 + len(fact.value) + 1 for chain in chains for fact in chain) or len(ACKNOWLEDGEMENT)
        free_words = stop - len(words) - MARKERS_PER_TURN - answer_length - len(question)

        sentences: list[Fact | list[str]] = []
        fact_words = sum(len(fact.words) for fact in new)
        asked = {fact.key for chain in chains for fact in chain}
        while not self.task.lists and fact_words < self.task.fact_share * (free_words + len(question)) and self.places:
            new.append(self._fact(turn))
            fact_words += len(new[-1].words)
        # A fact that no longer fits is dropped again, unless the answer needs it.
        while fact_words > max(free_words, 0) and new and new[-1].key not in asked:
            dropped = new.pop()
            fact_words -= len(dropped.words)
            del self.layout.facts[dropped.key]
        free_words -= fact_words
        sentences.extend(new)
        while free_words >= _SHORTEST_SENTENCE:
            talk = self._small_talk()
            if len(talk) <= free_words:
                sentences.append(talk)
                free_words -= len(talk)
        rng.shuffle(sentences)
        if self.task.lists:
            chains = [[sentence] for sentence in sentences if isinstance(sentence, Fact)]
            question = self._question([chain[0].key for chain in chains])
        self.unasked.append([fact for fact in new if fact.key not in asked])
        self._place(turn, sentences, question, chains)

    def _choose(self, turn: int, free_words: int, new: list[Fact]) -> list[list[Fact]]:
        """Return the facts to ask for, one chain per key: some stated earlier, some to be stated in this turn (added to `new`)."""
        low, high = self.task.key_range
        if self.task.lists:
            new.extend(self._fact(turn) for _ in range(self.rng.randint(low, high)))
            return [[fact] for fact in new]
        chains: list[list[Fact]] = []
        for _ in range(self.rng.randint(low, high)):
            # A short turn has no space for a new fact, so it asks for an older one.
            used = MARKERS_PER_TURN + 6 + sum(2 + 2 * len(f.words) for chain in chains for f in chain)
            short = self.task.uneven and bool(chains or turn) and used + 20 * self.task.chain > free_words
            if short and chains and used > free_words:
                break
            if self.rng.random() < self.task.again_share and (old := [c for c in self.asked if c not in chains]):
                chains.append(self.rng.choice(old))
                continue
            wanted = self.task.distance
            distance = self.rng.randint(1 if short and turn else 0, turn) if wanted is None else min(wanted, turn)
            if self.task.chain > 1 and self.rng.random() < self.task.chain_share:
                chains.append(self._chain(turn, new))
            elif distance and (fact := self._take(turn, distance)):
                chains.append([fact])
            elif not short or not chains:
                new.append(self._fact(turn))
                chains.append([new[-1]])
        self.asked.extend(chain for chain in chains if chain not in self.asked)
        return chains

    def _take(self, turn: int, distance: int) -> Fact | None:
        """Remove and return an unasked fact of the turn `distance` back, or of the nearest earlier turn that has one left."""
        for origin in range(turn - distance, -1, -1):
            if self.unasked[origin]:
                return self.unasked[origin].pop(self.rng.randrange(len(self.unasked[origin])))
        return None

    def _chain(self, turn: int, new: list[Fact]) -> list[Fact]:
        """Return a plain fact, new or older, and new facts in this turn that lead to it."""
        last = self._take(turn, self.rng.randint(1, turn)) if turn and self.rng.random() < 0.5 else None
        if last is None:
            last = self._fact(turn)
            new.append(last)
        chain = [last]
        for _ in range(self.task.chain - 1):
            target = chain[0].key
            fact = Fact(self.places.pop(), ("kept", "in", target), turn, leads_to=target)
            self.layout.facts[fact.key] = fact
            new.append(fact)
            chain.insert(0, fact)
        return chain

    def _fact(self, turn: int) -> Fact:
        code = tuple(self.rng.sample(CODE_WORDS, self.rng.randint(*self.task.code_words)))
        fact = Fact(self.places.pop(), code, turn)
        self.layout.facts[fact.key] = fact
        return fact

    def _question(self, keys: list[str]) -> list[str]:
        return list(LIST_ALL) if self.task.list_all == "unnamed" else _question(keys)

    def _small_talk(self) -> list[str]:
        choice = self.rng.choice
        return [choice(SLOTS[word]) if word in SLOTS else word for word in choice(_TALK)]

    def _place(
        self, turn: int, sentences: list[Fact | list[str]], question: list[str], chains: list[list[Fact]]
    ) -> None:
        """Append the turn's words to the dialogue, the question at its position, and record the positions."""
        words, facts = self.layout.words, self.layout.facts
        words.append("<user>")
        text_start = len(words)
        wanted = self.task.position
        position: Position = self.rng.choice(_POSITIONS) if wanted == "mixed" else wanted
        lengths = [len(s.words) if isinstance(s, Fact) else len(s) for s in sentences]
        before = _split(lengths, position)
        marks: list[int] = []
        for index in range(len(sentences) + 1):
            if index == before and question:
                places = {chain[0].key for chain in chains} | {"?"}
                marks = [len(words) + at for at, word in enumerate(question) if word in places]
                words.extend(question)
            if index < len(sentences):
                sentence = sentences[index]
                if isinstance(sentence, Fact):
                    sentence.start = len(words) + 3
                    sentence = list(sentence.words)
                words.extend(sentence)
        text = words[text_start:]
        words.append("<assistant>")
        start = len(words)
        sources: list[int] = []
        owners: list[int] = []
        # The last mark is the question mark; places that the question does not name are first named by their facts.
        unnamed = self.task.list_all == "unnamed"
        asked = [chain[0].start for chain in chains] if unnamed else marks[:-1]
        for source, chain in zip(asked, chains, strict=True):
            for fact in chain:
                owner, length = len(words), len(fact.value)
                words.extend((fact.key, "is", *fact.value, "."))
                sources.extend((source, fact.start + 1, *range(fact.start + 2, fact.start + 3 + length)))
                owners.extend([owner] * (3 + length))
                source = owner + 1 + length  # a pointer's last word names the next place of the chain
        if not chains:
            words.extend(ACKNOWLEDGEMENT)
            sources, owners = [-1, -1], [start, start]
        sources.append(marks[-1] if marks else -1)
        distances = tuple(turn - facts[chain[-1].key].turn for chain in chains)
        self.layout.turns.append(
            TurnLayout(
                turn=Turn(
                    text=" ".join(text),
                    answer=" ".join(words[start:]),
                    question=" ".join(question),
                    position=position,
                    keys=tuple(chain[0].key for chain in chains),
                    distances=distances,
                ),
                text_start=text_start,
                question_keys=marks,
                answer_start=start,
                answer_stop=len(words),
                sources=sources,
                owners=owners,
            )
        )
        words.append("<eot>")


_TALK = tuple(tuple(sentence.split()) for sentence in SMALL_TALK)


def _question(keys: list[str]) -> list[str]:
    """Return `what is the code of a ?`, `what are the codes of a and b ?` or `what are the codes of a , b and c ?`."""
    if not keys:
        return []
    if len(keys) == 1:
        return ["what", "is", "the", "code", "of", keys[0], "?"]
    listed = [word for key in keys[:-1] for word in (",", key)][1:]
    return ["what", "are", "the", "codes", "of", *listed, "and", keys[-1], "?"]


def _split(lengths: list[int], position: Position) -> int:
    """Return the number of sentences before the question: none, those nearest to half of the words, or all."""
    if position == "begin":
        return 0
    if position == "end":
        return len(lengths)
    half, reached = sum(lengths) / 2, 0
    for index, length in enumerate(lengths):
        if reached + length / 2 >= half:
            return index
        reached += length
    return len(lengths)
