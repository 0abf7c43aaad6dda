"""Generate or record attention inputs, and draw line patterns of a given density.

``structured_heads`` builds queries and keys so that the scaled product is a sum of four parts, in blocks of channels:

- a function of the distance, by rotary pairs: ``sum_p h_p / F * sum_f cos(f (i - j - d_p))`` peaks at the distances
  ``d_p`` (slash lines; ``d = 0`` is the local band) and is noise elsewhere, as with RoPE;
- verticals: a few columns with heavy-tailed strength, each assigned to one of several topics; the topic of a row changes
  every few hundred rows;
- sinks: the first columns, for every row;
- unstructured channels with normal noise.

Heads differ in the height of each part. All values depend on the seed only. ``model_heads`` records a real model on one
long conversation of recall dialogues.

``PlantedSparsifier`` serves models with random weights, whose attention has no structure.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import ClassVar, Literal

import torch
from torch import Tensor

from loopserve.api import Engine
from loopserve.bench.recall import HELD_OUT_SEED, RecallTask, make_dialogues
from loopserve.chat_session import ChatSession
from loopserve.core.errors import ConfigError
from loopserve.core.policy.interfaces import AttentionInputs, PrefillSparsifier
from loopserve.core.policy.patterns import TILE, AttentionPattern, DensePattern, LinePattern
from loopserve.core.stack.stack import PolicyStack
from loopserve.models.bridge import TransformersModel
from loopserve.models.loading import load
from loopserve.policies.decode.full import FullDecode

SINKS = 4
_TOPICS = 4
_TOPIC_ROWS = 256  # rows after which a head follows another topic
_NOISE = 1.0  # standard deviation of the unstructured part of a score
_SLOWEST, _FASTEST = 1 / 400, 1 / 2.5  # cycles per token of the rotary pairs
_MOST_PAIRS = 22  # higher peaks would be sharper than those of trained heads
_GROUP = 16  # verticals that a planted pattern adds per step
_SPARE = 64  # positions kept free below the model's limit for the answer
_LONGEST = 8192  # maximum number of recorded tokens
_DIALOGUE = 2000  # words per dialogue; the conversation holds as many dialogues as fit


@dataclass(frozen=True)
class Kind:
    """Hold the heights of the score's parts for one kind of head, in units of the softmax's exponent."""

    local: float
    slash: float
    offsets: int
    vertical: float
    sink: float


KINDS = (
    Kind(local=12.5, slash=0.0, offsets=0, vertical=4.0, sink=10.0),  # attends to its neighbourhood
    Kind(local=7.0, slash=0.0, offsets=0, vertical=6.0, sink=11.0),  # attends to a few columns
    Kind(local=9.5, slash=11.5, offsets=2, vertical=3.0, sink=10.5),  # attends at fixed distances
    Kind(local=9.0, slash=8.5, offsets=3, vertical=5.5, sink=11.0),  # mixes all parts
)


@dataclass(frozen=True)
class Heads:
    """Hold queries ``[Hq, m, D]``, keys and values ``[Hkv, n, D]`` of one layer's call. ``data`` describes their source."""

    queries: Tensor
    keys: Tensor
    values: Tensor
    data: str

    @property
    def scaling(self) -> float:
        return float(self.queries.shape[2] ** -0.5)

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.queries, self.keys, self.values

    @property
    def history(self) -> int:
        return self.keys.shape[1] - self.queries.shape[1]

    def to(self, dtype: torch.dtype) -> Heads:
        return replace(self, **{name: getattr(self, name).to(dtype) for name in ("queries", "keys", "values")})

    def first(self, kv_heads: int) -> Heads:
        """Return the first KV heads with their query heads."""
        group = self.queries.shape[0] // self.keys.shape[0]
        return replace(
            self,
            queries=self.queries[: kv_heads * group],
            keys=self.keys[:kv_heads],
            values=self.values[:kv_heads],
        )


def structured_heads(
    query_heads: int, kv_heads: int, new_tokens: int, total: int, head_dim: int, seed: int = 0, device: str = "cpu"
) -> Heads:
    """Return synthetic heads in float32, with the structure that the module documents. head_dim must be even and at least 32."""
    if head_dim < 32 or head_dim % 2 or query_heads % kv_heads:
        raise ValueError(f"structured heads need an even head_dim >= 32 and kv_heads that divide {query_heads}")
    draw = torch.Generator(device=device).manual_seed(seed)
    pairs = min((head_dim - _TOPICS - 1) * 3 // 8, _MOST_PAIRS)
    columns = torch.arange(total, dtype=torch.float64, device=device)
    keys = torch.empty(kv_heads, total, head_dim, dtype=torch.float32, device=device)
    queries = torch.empty(query_heads, new_tokens, head_dim, dtype=torch.float32, device=device)
    group = query_heads // kv_heads
    for kv in range(kv_heads):
        spread = torch.rand(pairs, generator=draw, device=device, dtype=torch.float64)
        cycles = 2 * math.pi * torch.exp(math.log(_SLOWEST) + spread * math.log(_FASTEST / _SLOWEST))
        keys[kv] = _key_rows(columns, cycles, head_dim, draw)
        for head in range(kv * group, (kv + 1) * group):
            queries[head] = _query_rows(
                columns[total - new_tokens :], total, cycles, head_dim, KINDS[head % len(KINDS)], draw
            )
    values = torch.randn(kv_heads, total, head_dim, generator=draw, dtype=torch.float32, device=device)
    values[:, :SINKS] *= 0.05  # attention mass on sinks is mass that the head does not use
    return Heads(queries * head_dim**0.5, keys, values, f"structured, seed {seed}")


def _key_rows(columns: Tensor, cycles: Tensor, head_dim: int, draw: torch.Generator) -> Tensor:
    """Return keys ``[n, D]`` of one KV head: rotary pairs, topics, sinks, noise."""
    total, device = len(columns), columns.device
    angles = columns[:, None] * cycles
    topics = torch.zeros(total, _TOPICS, dtype=torch.float32, device=device)
    count = max(total // 32, 1)
    for topic in range(_TOPICS):
        places = torch.randperm(total, generator=draw, device=device)[:count]
        strength = 1.0 + 0.25 * torch.empty(count, dtype=torch.float32, device=device).exponential_(generator=draw)
        topics[places, topic] = strength.clamp(max=1.8)
    sinks = torch.zeros(total, 1, dtype=torch.float32, device=device)
    sinks[:SINKS] = 1.0
    noise = torch.randn(
        total, head_dim - 2 * len(cycles) - _TOPICS - 1, generator=draw, dtype=torch.float32, device=device
    )
    return torch.cat([angles.cos().float(), angles.sin().float(), topics, sinks, noise], dim=1)


def _query_rows(
    columns: Tensor, total: int, cycles: Tensor, head_dim: int, kind: Kind, draw: torch.Generator
) -> Tensor:
    """Return queries ``[m, D]`` of one head, so that the product with a key is the score."""
    rows, device, pairs = len(columns), columns.device, len(cycles)
    heights, distances = [kind.local], [0.0]
    for _ in range(kind.offsets):
        # Long distances are rarer: log-uniform between a local window and the whole length.
        spread = float(torch.rand(1, generator=draw, dtype=torch.float32, device=device))
        distances.append(float(round(math.exp(math.log(64) + spread * math.log(max(total / 2, 65) / 64)))))
        heights.append(
            kind.slash * (0.9 + 0.2 * float(torch.rand(1, generator=draw, dtype=torch.float32, device=device)))
        )
    angles = (columns[:, None, None] - torch.tensor(distances, dtype=torch.float64, device=device)[:, None]) * cycles
    weights = torch.tensor(heights, dtype=torch.float64, device=device)[:, None] / pairs
    segments = (columns // _TOPIC_ROWS).long()
    plan = torch.randint(0, _TOPICS, (total // _TOPIC_ROWS + 1,), generator=draw, device=device)
    topics = torch.full((rows, _TOPICS), 0.3 * kind.vertical, dtype=torch.float32, device=device)
    topics[torch.arange(rows, device=device), plan[segments]] = kind.vertical
    sinks = torch.full((rows, 1), kind.sink, dtype=torch.float32, device=device)
    free = head_dim - 2 * pairs - _TOPICS - 1
    noise = torch.randn(rows, free, generator=draw, dtype=torch.float32, device=device) * (_NOISE / free**0.5)
    rotary = [(weights * angles.cos()).sum(1).float(), (weights * angles.sin()).sum(1).float()]
    return torch.cat([*rotary, topics, sinks, noise], dim=1)


def random_heads(
    query_heads: int, kv_heads: int, new_tokens: int, total: int, head_dim: int, seed: int = 0, device: str = "cpu"
) -> Heads:
    """Return normally distributed heads, which have no structure, as random weights produce them."""
    draw = torch.Generator(device=device).manual_seed(seed)
    queries = torch.randn(query_heads, new_tokens, head_dim, generator=draw, dtype=torch.float32, device=device)
    keys = torch.randn(kv_heads, total, head_dim, generator=draw, dtype=torch.float32, device=device)
    values = torch.randn(kv_heads, total, head_dim, generator=draw, dtype=torch.float32, device=device)
    return Heads(queries, keys, values, f"random, seed {seed}")


def planted_lines(
    query_heads: int,
    new_tokens: int,
    total: int,
    density: float,
    *,
    of: Literal["cells", "tiles"] = "cells",
    seed: int = 0,
    device: str = "cpu",
) -> LinePattern:
    """Return lines of a given mean density: sinks, a local band, and verticals and slash bands drawn per head.

    Half of the lines are verticals (scattered columns), half are slashes in runs of 64 neighbouring offsets, as a cost
    counted in tiles favours. The number of lines is the same for each head and found by bisection. The density is exact
    within one group of lines.
    """
    if not 0 < density <= 1:
        raise ValueError(f"density {density} must lie in (0, 1]")
    draw = torch.Generator(device=device).manual_seed(seed)
    scattered = torch.stack([torch.randperm(total, generator=draw, device=device) for _ in range(query_heads)])
    bands = -(-total // TILE)
    order = torch.stack([torch.randperm(bands, generator=draw, device=device) for _ in range(query_heads)])
    offsets = torch.arange(total, device=device)

    def pattern(groups: int) -> LinePattern:
        verticals = (offsets < SINKS).repeat(query_heads, 1)
        verticals.scatter_(1, scattered[:, : groups * _GROUP * (TILE // _GROUP)], True)
        chosen = torch.zeros(query_heads, bands, dtype=torch.bool, device=device)
        chosen.scatter_(1, order[:, :groups], True)
        chosen[:, 0] = True  # the local band
        slashes = chosen.repeat_interleave(TILE, dim=1)[:, :total]
        return LinePattern(verticals, slashes, new_tokens)

    def reached(groups: int) -> float:
        found = pattern(groups)
        return float((found.cell_density() if of == "cells" else found.tile_density()).mean())

    low, high = 0, bands
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if reached(middle) <= density else (low, middle)
    return pattern(low)


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


class PlantedSparsifier(PrefillSparsifier):
    """Score and select with another sparsifier, then compute planted lines of a given density instead of its choice.

    Where the other one falls back to dense before its selection, this one does too. Patterns are drawn once per shape.
    ``choosing_s``: seconds of the other one. ``drawing_s``: seconds of drawing the lines, which no real stack spends.
    Both count since they were last set to 0.
    """

    name: ClassVar[str] = "planted"
    paper: ClassVar[str] = ""

    def __init__(
        self,
        chooser: PrefillSparsifier,
        density: float,
        of: Literal["cells", "tiles"] = "cells",
        *,
        structured: bool = False,
    ) -> None:
        """Wrap a sparsifier. structured: it selects on synthetic heads of the call's shape (``bench.heads``).

        Without structured heads it selects on flat attention, where a share of the mass needs as large a share of the
        lines.
        """
        super().__init__()
        self.structured = structured
        self._heads: dict[tuple[int, ...], Heads] = {}
        self.chooser, self.density, self.of = chooser, density, of
        self.choosing_s = self.drawing_s = 0.0
        self._patterns: dict[tuple[int, int, int, str], LinePattern] = {}

    def sparsify(self, inputs: AttentionInputs) -> AttentionPattern:
        started = _now(inputs)
        inputs = self._structured(inputs) if self.structured else inputs
        pattern = self.planted(inputs)
        drawn = _now(inputs)
        chosen = self.chooser.sparsify(inputs)
        self.drawing_s += drawn - started
        self.choosing_s += _now(inputs) - drawn
        return chosen if isinstance(chosen, DensePattern) else pattern

    def _structured(self, inputs: AttentionInputs) -> AttentionInputs:
        shape = (len(inputs.queries), len(inputs.keys), inputs.new_tokens, inputs.total_tokens, inputs.keys.shape[2])
        if shape not in self._heads:
            made = structured_heads(*shape, device=str(inputs.keys.device))
            self._heads = {shape: made.to(inputs.keys.dtype)}  # of one length at a time
        heads = self._heads[shape]
        return replace(inputs, queries=heads.queries, keys=heads.keys, scaling=heads.scaling, softcap=None, scratch={})

    def planted(self, inputs: AttentionInputs) -> LinePattern:
        """Return the pattern for such a call."""
        key = (inputs.queries.shape[0], inputs.new_tokens, inputs.total_tokens, str(inputs.keys.device))
        if key not in self._patterns:
            heads, new, total, device = key
            self._patterns[key] = planted_lines(heads, new, total, self.density, of=self.of, device=device)
        return self._patterns[key]


def _now(inputs: AttentionInputs) -> float:
    """Return seconds on the clock, after the device has finished its queue."""
    if inputs.keys.device.type == "cuda":
        torch.cuda.synchronize(inputs.keys.device)
    return time.perf_counter()
