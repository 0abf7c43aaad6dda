"""Record every selection of a scripted conversation, and repair the wrong ones.

A wrong selection is recorded and repaired before it is carried out, so that one broken promise does not stop the
conversation in which another is checked.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from loopserve.core.errors import PolicyError
from loopserve.core.policy.interfaces import DecodeCompressor, KVSelection
from loopserve.testing.scripted import ScriptedConversation
from loopserve.testing.subject import NotApplicable, Subject


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
