"""Keep a conversation as messages and as tokens, and prepare a session of tokens for the next message."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from loopserve.core.engine.session import UNDO_DEPTH, Session
from loopserve.core.engine.stats import TurnStats
from loopserve.models.chat import Answered, ChatTokenizer, Prompt
from loopserve.models.messages import Message


@dataclass(frozen=True)
class TranscriptTurn:
    """Hold one turn that was answered here. depth: number of turns of the session before it."""

    answered: Answered
    stats: TurnStats
    depth: int


@dataclass
class Transcript:
    """Hold the messages of a conversation and the tokens of the answers that the model gave.

    given_tokens: by index of a message, the tokens of a loaded answer. They are checked once, when they are needed.
    """

    tokenizer: ChatTokenizer
    messages: list[Message] = field(default_factory=list)
    turns: list[TranscriptTurn] = field(default_factory=list)
    loaded: list[Answered] = field(default_factory=list)
    given_tokens: Mapping[int, Sequence[int]] = field(default_factory=dict)

    @property
    def answered(self) -> list[Answered]:
        """Return the answers whose own tokens are known, in order."""
        self._adopt()
        return sorted([*self.loaded, *(turn.answered for turn in self.turns)], key=lambda entry: entry.message)

    def prompt(self, asked: Sequence[Message]) -> Prompt:
        """Return the tokens of a conversation. Answers that it shares with this one keep their tokens."""
        same = self.common(asked)
        return self.tokenizer.prompt(asked, [entry for entry in self.answered if entry.message < same])

    def common(self, messages: Sequence[Message]) -> int:
        """Return the number of messages that two conversations have in common at their beginning."""
        pairs = list(zip(self.messages, messages, strict=False))
        return next((n for n, pair in enumerate(pairs) if not _same(*pair)), len(pairs))

    def add(self, asked: Sequence[Message], turn: TranscriptTurn) -> None:
        """Add a turn that was answered."""
        same, answer = self.common(asked), turn.answered.answer
        self._cut(same)
        reply = {"role": "assistant", "content": answer.text.strip()}
        if answer.reasoning is not None:
            reply["reasoning_content"] = answer.reasoning
        self.messages = [*asked, reply]
        self.turns.append(turn)
        for number in range(len(self.turns) - UNDO_DEPTH):  # all prompts grow with the square of the turns
            old = self.turns[number]
            if old.answered.prompt.tokens:
                prompt = replace(old.answered.prompt, tokens=())
                self.turns[number] = replace(old, answered=replace(old.answered, prompt=prompt))

    def take_back(self) -> tuple[Message, int | None] | None:
        """Remove the last turn. Return its user message, and the session depth before it if it was answered here."""
        asked = [number for number, message in enumerate(self.messages) if message["role"] == "user"]
        if not asked:
            return None
        taken = self.messages[asked[-1]]
        depths = [turn.depth for turn in self.turns if turn.answered.message >= asked[-1]]
        self._cut(asked[-1])
        self.messages = self.messages[: asked[-1]]
        return taken, min(depths, default=None)

    def copy(self) -> Transcript:
        """Return a copy that shares no mutable object."""
        return Transcript(
            self.tokenizer, list(self.messages), list(self.turns), list(self.loaded), dict(self.given_tokens)
        )

    def saved(self) -> list[dict[str, object]]:
        """Return the messages in the form of a saved conversation: with the tokens of the answers, where they are known."""
        tokens = {entry.message: list(entry.tokens) for entry in self.answered}
        return [
            {**message, **({"token_ids": tokens[number]} if number in tokens else {})}
            for number, message in enumerate(self.messages)
        ]

    def _cut(self, messages: int) -> None:
        self.turns = [turn for turn in self.turns if turn.answered.message < messages]
        self.loaded = [entry for entry in self.loaded if entry.message < messages]
        self.given_tokens = {number: ids for number, ids in self.given_tokens.items() if number < messages}

    def _adopt(self) -> None:
        """Use the tokens of loaded answers, where their text equals the message."""
        given, self.given_tokens = self.given_tokens, {}
        for number in sorted(given):
            prompt = self.tokenizer.prompt(self.messages[:number], self.loaded)
            answer = self.tokenizer.read_answer(given[number], prompt.text)
            if answer.text.strip() == self.messages[number]["content"].strip():
                self.loaded.append(Answered(number, prompt, answer, tuple(given[number])))


def bring_to(session: Session, tokens: Sequence[int]) -> None:
    """Remove from a session what follows its common beginning with ``tokens``: whole turns, or an end token alone.

    At least one token is left to compute.
    """
    session.require_rest()
    common = min(_common(session.tokens, tokens), len(tokens) - 1)
    held = len(session.tokens)
    if common == held - 1 and session.turns and session.turns[-1].output_tokens and session.cache.seen <= common:
        del session.tokens[
            common:
        ]  # the token that ended the answer: not computed yet, and the template writes another one there
        return
    while len(session.tokens) > common and session.turns:
        session.undo()


def _common(held: Sequence[int], wanted: Sequence[int]) -> int:
    if list(wanted[: len(held)]) == list(held):
        return len(held)
    return next((n for n, (a, b) in enumerate(zip(held, wanted, strict=False)) if a != b), min(len(held), len(wanted)))


def _same(held: Message, given: Message) -> bool:
    if held["role"] != given["role"]:
        return False
    if held["role"] == "assistant":  # reasoning is rarely sent back, and white space is often lost
        calls = held.get("tool_calls") == given.get("tool_calls")
        return calls and held["content"].strip() == given["content"].strip()
    return held["content"] == given["content"]
