"""Record queries, keys and values of a real model on one long conversation of recall dialogues."""

from __future__ import annotations

from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from loopserve.api import Engine
from loopserve.bench.heads import Heads
from loopserve.bench.recall import HELD_OUT_SEED, RecallTask, make_dialogues
from loopserve.chat_session import ChatSession
from loopserve.core.errors import ConfigError
from loopserve.core.policy.interfaces import AttentionInputs, PrefillSparsifier
from loopserve.core.policy.patterns import AttentionPattern, DensePattern
from loopserve.core.stack.stack import PolicyStack
from loopserve.models.bridge import TransformersModel
from loopserve.models.loading import load
from loopserve.policies.decode.full import FullDecode

_SPARE = 64  # positions kept free below the model's limit for the answer
_LONGEST = 8192  # maximum number of recorded tokens
_DIALOGUE = 2000  # words per dialogue; the conversation holds as many dialogues as fit


class Recorder(PrefillSparsifier):
    """Attend densely and record the inputs of each layer, for one pass of one session."""

    name: ClassVar[str] = "recorder"
    paper: ClassVar[str] = ""

    def __init__(self) -> None:
        super().__init__()
        self.layers: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def sparsify(self, inputs: AttentionInputs) -> AttentionPattern:
        taken = (inputs.queries, inputs.keys, inputs.values)
        self.layers[inputs.layer.index] = tuple(each.detach().clone() for each in taken)  # type: ignore[assignment]
        return DensePattern(inputs.queries.shape[0], inputs.new_tokens, inputs.total_tokens)


@lru_cache(maxsize=1)
def _recorded(model: str) -> dict[int, tuple[Tensor, Tensor, Tensor]]:
    """Return per layer the queries ``[Hq, T, D]``, keys and values ``[Hkv, T, D]`` of one conversation, from one prefill."""
    loaded, tokenizer = load(model, dtype="float32")
    recorder = Recorder()
    stack = PolicyStack("recorder", recorder, FullDecode())
    limit = min(TransformersModel(loaded).max_positions or _LONGEST, _LONGEST) - _SPARE
    engine = Engine(loaded, tokenizer, stack, chunk_tokens=limit + _SPARE)
    task = RecallTask(tokens=min(_DIALOGUE, limit), turns=3, position="mixed")
    dialogues = make_dialogues(task, max(limit // task.tokens, 1), HELD_OUT_SEED)
    turns = [turn for dialogue in dialogues for turn in dialogue.turns]
    spoken = [({"role": "user", "content": t.text}, {"role": "assistant", "content": t.answer}) for t in turns]
    messages = [message for pair in spoken for message in pair]
    with ChatSession(engine, messages=messages[:-2]) as chat:
        chat.send(turns[-1].text, max_new_tokens=1)
    return recorder.layers


def model_heads(query_heads: int, new_tokens: int, total: int, *, model: str = "demo", device: str = "cpu") -> Heads:
    """Return heads of a real model in float32: KV head 0 of every layer with its query heads, then KV head 1 of every layer.

    A conversation shorter than ``total`` is repeated, which also repeats its slash lines; ``data`` then names the
    repetition. Raises ConfigError if the model has too few heads.
    """
    layers = _recorded(model)
    queries, keys, values = (torch.stack([layer[part] for layer in layers.values()], dim=1) for part in range(3))
    kv_heads, count, length, dim = keys.shape
    group = queries.shape[0] // kv_heads
    wanted, rest = divmod(query_heads, group)
    if rest or not 0 < wanted <= kv_heads * count:
        raise ConfigError(
            f"model {model!r} has {kv_heads * count} KV heads of {group} query heads: {query_heads} query heads "
            f"cannot be had of it"
        )
    by_owner = queries.view(kv_heads, group, count, length, dim).transpose(1, 2).flatten(0, 1)
    queries = by_owner[:wanted].flatten(0, 1)
    keys, values = (each.flatten(0, 1)[:wanted] for each in (keys, values))
    times = -(-total // length)
    description = f"model {model}, {wanted} of {kv_heads * count} KV heads"
    description += f", {length} tokens cut to {total}" if times == 1 else f", {length} tokens repeated to {total}"
    cut = [each.repeat(1, times, 1)[:, :total].to(device) for each in (queries, keys, values)]
    return Heads(cut[0][:, total - new_tokens :].contiguous(), cut[1].contiguous(), cut[2].contiguous(), description)
