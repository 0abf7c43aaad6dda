"""Run a compressor as the engine does, without a model, and record every selection.

Queries and keys are given. A wrong selection is recorded and repaired before it is carried out, so that one broken
promise does not stop the conversation in which another is checked.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from loopserve.core.engine.slots import Slots
from loopserve.core.errors import PolicyError
from loopserve.core.kv.cache import KVCache
from loopserve.core.kv.selection import KVSelection
from loopserve.core.kv.selection_request import SelectionRequest
from loopserve.core.policy.interfaces import AttentionInputs, DecodeCompressor, Observation, Phase, Step
from loopserve.core.policy.layers import LayerSpec, LayerType
from loopserve.core.stack.stack import PolicyStack
from loopserve.policies.prefill.dense import DensePrefill
from loopserve.testing.inputs import FakeRecord, PlainParts
from loopserve.testing.subject import NotApplicable, Subject


class ScriptedConversation:
    """Feed tokens by position to one compressor that selects for every layer, and carry out its selections.

    queries ``[L, Hq, N, D]`` and keys ``[L, Hkv, N, D]`` for all N positions of the conversation; an observation runs
    the queries of its positions again.
    """

    def __init__(
        self, compressor: DecodeCompressor[Any], queries: Tensor, keys: Tensor, scaling: float | None = None
    ) -> None:
        self.compressor = compressor
        self.state = compressor.init_state()
        self.queries, self.keys = queries, keys
        self.scaling = scaling if scaling is not None else keys.shape[-1] ** -0.5
        self.cache = KVCache(len(keys))
        heads, kv_heads, dim = queries.shape[1], keys.shape[1], keys.shape[-1]
        parts = PlainParts(heads, dim)
        self.layers = tuple(LayerSpec(i, LayerType.FULL, heads, kv_heads, dim, parts=parts) for i in range(len(keys)))
        self._policies = Slots(self.layers, PolicyStack("scripted", DensePrefill(), compressor))
        self.turn, self.turn_start, self.output_index = -1, 0, 0
        self.record = FakeRecord()
        self.observed: list[Tensor] = []  # positions of each requested observation
        self.selections: list[dict[int, KVSelection]] = []  # return values of after_forward
        self.attended: list[float] = []  # pairs per KV head that each output attended to, mean over heads and layers

    def prefill(self, tokens: int, chunks: Sequence[int] | None = None) -> None:
        """Begin a turn with its next ``tokens`` tokens, in chunks of the given sizes."""
        if self.turn >= 0:
            self.compressor.end_turn(self.state)
        self.cache.release()
        self.turn += 1
        self.turn_start, self.output_index = self.cache.seen, 0
        self.record = FakeRecord()
        pieces = list(chunks or [tokens])
        assert sum(pieces) == tokens
        for number, piece in enumerate(pieces):
            self._run(Phase.PREFILL, piece, final=number == len(pieces) - 1)

    def decode(self, steps: int = 1) -> None:
        """Process that many outputs."""
        for _ in range(steps):
            self._run(Phase.DECODE, 1, final=True)

    def take(self, layer: int, selection: KVSelection) -> None:
        """Carry out the compressor's selection for a layer."""
        self.cache.layers[layer].select(selection)

    def active(self, layer: int = 0) -> KVSelection | None:
        """Return the pairs that the layer attends to now; None = all."""
        found = self.cache.layers[layer].active
        return found.selection if found is not None else None

    def _run(self, phase: Phase, tokens: int, *, final: bool) -> None:
        positions = torch.arange(self.cache.seen, self.cache.seen + tokens, device="cpu")
        pairs, called = 0.0, False
        for spec in self.layers:
            keys = self.keys[spec.index][:, positions]
            self.cache.layers[spec.index].append(keys, keys)
            inputs = self._inputs(spec, phase, positions, final)
            stored = self.cache.layers[spec.index].stored
            shown = self._policies.by_layer[spec.index].shows(stored)
            called |= shown
            if phase is Phase.DECODE:
                selection = self.compressor.before_attention(inputs, self.state) if shown else None
                if isinstance(selection, SelectionRequest):
                    selection = selection.make()
                if selection is not None:
                    self.take(spec.index, selection)
                pairs += self._pairs(spec.index)
            if shown:
                self.compressor.after_attention(self._inputs(spec, phase, positions, final), self.state)
        if phase is Phase.DECODE:
            self.output_index += 1
            self.attended.append(pairs / len(self.layers))
        if called:
            self._finish(phase, final)

    def _finish(self, phase: Phase, final: bool) -> None:
        answer = self.compressor.after_forward(
            Step(
                phase=phase,
                turn=self.turn,
                turn_start=self.turn_start,
                length=self.cache.seen,
                output_index=self.output_index,
                final=final,
                layers=self.layers,
                record=self.record,
            ),
            self.state,
        )
        if isinstance(answer, Observation):
            assert phase is not Phase.OBSERVE or answer.again
            self.observed.append(answer.positions)
            if answer.again:
                self._read_again(len(answer.prompt) + len(answer.positions))
                return
            for spec in self.layers:
                self.compressor.after_attention(
                    self._inputs(spec, Phase.OBSERVE, answer.positions, final=True), self.state
                )
            self._finish(Phase.OBSERVE, final=True)
        elif answer is not None:
            self.selections.append(dict(answer))
            for layer, selection in answer.items():
                self.take(layer, selection)

    def _read_again(self, tokens: int) -> None:
        """Read tokens behind the conversation and drop them. The tokens that the script has there, or its first, stand for them."""
        positions = torch.arange(self.cache.seen, self.cache.seen + tokens, device="cpu")
        for spec in self.layers:
            keys = self.keys[spec.index][:, positions % self.keys.shape[2]]
            self.cache.layers[spec.index].append(keys, keys)
            self.compressor.after_attention(self._inputs(spec, Phase.OBSERVE, positions, final=True), self.state)
        for layer in self.cache.layers:
            layer.drop_last(tokens)
        self._finish(Phase.OBSERVE, final=True)

    def _pairs(self, layer: int) -> float:
        """Return the pairs that a query attends to now, on average over the layer's KV heads."""
        cache = self.cache.layers[layer]
        heads = self.keys.shape[1]
        if cache.active is not None:
            return cache.active.attended(cache.seen) / heads
        filler = 0 if cache.first_valid is None else int(cache.first_valid.sum())
        return cache.stored - filler / heads

    def _inputs(self, spec: LayerSpec, phase: Phase, positions: Tensor, final: bool) -> AttentionInputs:
        layer = self.cache.layers[spec.index]
        assert layer.store is not None
        total = layer.stored
        if phase is Phase.OBSERVE:
            row = layer.positions()
            columns = torch.searchsorted(row if row.dim() == 1 else row[0].contiguous(), positions)
        else:
            columns = torch.arange(total - len(positions), total, device="cpu")
        return AttentionInputs(
            queries=self.queries[spec.index][:, positions % self.queries.shape[2]],
            keys=layer.store.keys,
            values=layer.store.values,
            columns=columns,
            positions=layer.positions(),
            first_valid=layer.first_valid,
            layer=spec,
            phase=phase,
            turn=self.turn,
            turn_start=self.turn_start,
            output_index=self.output_index,
            final=final,
            scaling=self.scaling,
            softcap=None,
            record=self.record,
            selection=layer.active.selection if layer.active is not None else None,
            compressor_layers=self.layers,
        )


@dataclass(frozen=True, eq=False)
class GivenSelection:
    """Hold one selection as the compressor gave it, and the place in the conversation."""

    layer: int
    selection: KVSelection
    length: int
    turn: int
    output_index: int
    input_end: int  # position behind the last token of the turn's input

    @property
    def heads(self) -> list[Tensor]:
        return [self.selection.head(head) for head in range(len(self.selection.lengths))]


def form_of(selection: object, kv_heads: int) -> str | None:
    """Return what is wrong with a selection's types and shapes; None if nothing is."""
    if not isinstance(selection, KVSelection):
        return f"expected a KVSelection, got {type(selection).__name__}"
    indices, lengths = selection.indices, selection.lengths
    if indices.dtype != torch.long or indices.dim() != 2 or len(indices) != kv_heads:
        return f"indices must be int64 [{kv_heads}, S], got {indices.dtype} {list(indices.shape)}"
    if lengths.shape != (kv_heads,) or bool(((lengths < 0) | (lengths > indices.shape[1])).any()):
        return f"lengths must be {kv_heads} numbers from 0 to {indices.shape[1]}, got {lengths.tolist()}"
    return None


def _is_right(selection: KVSelection, length: int) -> bool:
    try:
        selection.check(len(selection.lengths), length)
    except PolicyError:
        return False
    return True


class RecordedConversation(ScriptedConversation):
    """Record every selection in ``given``, and in ``malformed`` the reason why one could not be carried out."""

    def __init__(self, compressor: DecodeCompressor[Any], queries: Tensor, keys: Tensor) -> None:
        super().__init__(compressor, queries, keys)
        self.given: list[GivenSelection] = []
        self.malformed: list[str] = []
        self.strangers: list[int] = []  # layers with a selection that the compressor does not serve
        self.gone: list[str] = []  # selected pairs that an earlier eviction has freed
        self._input_end = 0

    def prefill(self, tokens: int, chunks: Sequence[int] | None = None) -> None:
        self._input_end = self.cache.seen + tokens
        super().prefill(tokens, chunks)

    def take(self, layer: int, selection: KVSelection) -> None:
        if not 0 <= layer < len(self.layers):
            self.strangers.append(layer)
            return
        wrong = form_of(selection, self.keys.shape[1])
        if wrong is not None:
            self.malformed.append(wrong)
            return
        self.given.append(
            GivenSelection(layer, selection, self.cache.seen, self.turn, self.output_index, self._input_end)
        )
        super().take(layer, self._put_right(layer, selection))

    def _put_right(self, layer: int, selection: KVSelection) -> KVSelection:
        """Return the selection sorted, unique, in range, and restricted to the pairs that the store holds."""
        seen = self.cache.layers[layer].seen
        positions = self.cache.layers[layer].positions()
        if positions.dim() == 1 and _is_right(selection, seen):
            return selection
        boundary = min(max(selection.boundary, 0), seen)
        heads = []
        for number in range(len(selection.lengths)):
            held = positions if positions.dim() == 1 else positions[number]
            kept = selection.head(number).unique()
            lost = kept[(kept >= 0) & (kept < boundary) & ~torch.isin(kept, held)]
            if len(lost):
                self.gone.append(f"turn {self.turn}, layer {layer}, head {number}: positions {lost.tolist()[:5]}")
            heads.append(kept[(kept >= 0) & (kept < boundary) & torch.isin(kept, held)])
        if selection.boundary == boundary and all(
            torch.equal(kept, selection.head(number)) for number, kept in enumerate(heads)
        ):
            return selection
        return KVSelection.from_heads(heads, boundary, selection.retention)

    def run(self, steps: Iterable[tuple[str, int]], *, fork: bool = False) -> RecordedConversation:
        """Run a script. fork: replace the state by a deep copy after each of its steps."""
        for what, count in steps:
            self.prefill(count) if what == "prefill" else self.decode(count)
            if fork:
                self.state = copy.deepcopy(self.state)
        return self

    def well_formed(self) -> RecordedConversation:
        """Return itself. Raises NotApplicable if nothing was selected, or nothing that can be compared."""
        if self.malformed:
            raise NotApplicable("its selections have no valid form, see selections_have_the_right_form")
        if not self.given:
            raise NotApplicable("it selects nothing in three turns of a few dozen tokens")
        return self


def held(subject: Subject, seed: int = 0, compressor: DecodeCompressor[Any] | None = None) -> RecordedConversation:
    """Return the whole conversation of a subject, with selections of the right form."""
    talk = RecordedConversation(compressor or subject.compressor, *subject.script(seed))
    return talk.run(subject.steps).well_formed()


def difference(one: RecordedConversation, two: RecordedConversation) -> str | None:
    """Return where two conversations got different selections; None if nowhere."""
    if len(one.given) != len(two.given):
        return f"{len(one.given)} selections in one conversation, {len(two.given)} in the other"
    for left, right in zip(one.given, two.given, strict=True):
        same = left.layer == right.layer and left.selection.boundary == right.selection.boundary
        if not (same and torch.equal(left.selection.indices, right.selection.indices)):
            return f"turn {left.turn}, output {left.output_index}, layer {left.layer}: other pairs are selected"
    return None
