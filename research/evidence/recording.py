"""Queries, keys and values of one dialogue as the bundled model reads it, with the place of every part."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from torch import Tensor

from loopserve.api import Engine
from loopserve.bench.heads import Heads, Recorder
from loopserve.bench.recall import Layout, RecallTask, lay_out
from loopserve.chat_session import ChatSession
from loopserve.core.stack.stack import PolicyStack
from loopserve.models.loading import load
from loopserve.policies.decode.full import FullDecode


@dataclass(frozen=True)
class Recording:
    """One dialogue up to the last turn's ``<assistant>``, read densely in one pass, the earlier answers being gold.

    layers: by layer, queries ``[Hq, T, D]``, keys and values ``[Hkv, T, D]``, float32. A token is a word of the layout.
    """

    layers: dict[int, tuple[Tensor, Tensor, Tensor]]
    layout: Layout

    @property
    def length(self) -> int:
        return int(self.layers[0][0].shape[1])

    @property
    def turns(self) -> int:
        return len(self.layout.turns)

    def rows_of(self, turn: int) -> tuple[int, int]:
        """First and one past the last token of what a turn adds to be read: from ``<user>`` to ``<assistant>``."""
        part = self.layout.turns[turn]
        return (part.text_start - 1 if turn else 0), part.answer_start

    def question_rows(self, turn: int) -> tuple[int, int]:
        """First and one past the last token of a turn's question."""
        part = self.layout.turns[turn]
        stop = part.question_keys[-1] + 1
        return stop - len(part.turn.question.split()), stop

    def block(self, layer: int, start: int, stop: int) -> Heads:
        """The rows ``start`` to ``stop - 1`` of one layer over all columns before ``stop``."""
        queries, keys, values = self.layers[layer]
        return Heads(queries[:, start:stop], keys[:, :stop], values[:, :stop], "recorded")


@lru_cache(maxsize=2)
def loaded(model: str) -> tuple[Any, Any]:
    """Model and tokenizer, float32; kept, since every unit of a process asks for them."""
    return load(model, dtype="float32")


def record(model: str, task: RecallTask, seed: int) -> Recording:
    """Read the dialogue of this task and seed. ValueError if the model's tokens are not the dialogue's words."""
    network, tokenizer = loaded(model)
    layout = lay_out(task, seed)
    recorder = Recorder()
    engine = Engine(
        network, tokenizer, PolicyStack("recorder", recorder, FullDecode()), chunk_tokens=len(layout.words) + 64
    )
    messages = [
        message
        for part in layout.turns
        for message in (
            {"role": "user", "content": part.turn.text},
            {"role": "assistant", "content": part.turn.answer},
        )
    ]
    with ChatSession(engine, messages=messages[:-2]) as chat:
        chat.send(messages[-2]["content"], max_new_tokens=1)
    recording = Recording(recorder.layers, layout)
    if recording.length != layout.turns[-1].answer_start:
        raise ValueError(f"{recording.length} tokens were read, the dialogue has {layout.turns[-1].answer_start} words")
    return recording
