"""Define the two contracts of a policy and the inputs that it gets.

Shapes are those of ONE conversation: queries ``[Hq, Tq, D]``, keys and values ``[Hkv, Tk, D]``, with ``Hq = group * Hkv``. There
is no batch dimension and no padding: the bridge splits a batch into its rows and strips the padding first. A *column* is the index
of a stored key. A *position* is its place in the conversation. They differ only after an eviction.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, ClassVar, Generic, Protocol, Self, TypeVar

import torch
from torch import Tensor

from loopserve.core.kv.key_summaries import KeySummaries
from loopserve.core.kv.selection import KVSelection, Retention
from loopserve.core.kv.selection_request import SelectionRequest
from loopserve.core.policy.base import Policy
from loopserve.core.policy.layers import LayerSpec
from loopserve.core.policy.patterns import AttentionPattern
from loopserve.kernels.choose_columns import ColumnChoice
from loopserve.kernels.choose_lines import choose_lines
from loopserve.kernels.line_scores import LineScores, line_scores
from loopserve.kernels.paged import Rows
from loopserve.kernels.select_lines import LineSelection
from loopserve.kernels.token_scores import OverRows, token_scores

_COVERAGE_ROWS = 128  # rows whose attention over all keys is held at once when coverage is measured


class Phase(StrEnum):
    """Name the kind of a forward pass. It is given to a policy, which never guesses it from shapes."""

    PREFILL = "prefill"
    OBSERVE = "observe"  # rows of this turn are computed again to see what they attend to; nothing is appended
    DECODE = "decode"


class Record(Protocol):
    """Take the figures that a policy reports. The session owns it (see ``core.engine.stats``)."""

    def count(self, name: str, amount: float = 1.0) -> None:
        """Add to a counter of this turn, e.g. ``fallback:short_turn``."""

    def mean(self, name: str, value: float | Tensor) -> None:
        """Add one or more values to a mean of this turn, e.g. ``coverage_estimated``."""

    def read(self, kind: str, amount: float) -> None:
        """Add bytes of keys, values or summaries read from the cache, by kind (``attended``, ``scoring``, ``summaries``)."""


@dataclass(frozen=True, eq=False)
class AttentionInputs:
    """Hold everything about one attention call of one layer.

    queries ``[Hq, Tq, D]`` (rotated), keys and values ``[Hkv, Tk, D]``: the whole store, this call's own pairs included.
    columns ``[Tq]``: the queries' own columns (the last Tq in prefill and decode; any in an observation).
    positions ``[Tk]`` or ``[Hkv, Tk]`` (after an eviction heads differ): original positions, strictly increasing per head.
    first_valid ``[Hkv]`` or None: columns before it are filler of a head that holds fewer pairs; never attended.
    scratch: values computed once per call, shared by both policies of the layer and dropped after the pass.
    state: the sparsifier's state. The session owns it. A compressor gets its own state as an argument.
    """

    transient: ClassVar[bool] = True  # its tensors are views of the store, so no state holds one between two turns

    queries: Tensor
    keys: Tensor
    values: Tensor
    columns: Tensor
    positions: Tensor
    first_valid: Tensor | None
    layer: LayerSpec
    phase: Phase
    turn: int
    turn_start: (
        int  # position of the first token that this turn computes: from turn two on, the last answer's last token
    )
    output_index: int  # output tokens of this turn processed before this call
    final: bool  # False for all but the last chunk of a chunked prefill
    scaling: float
    softcap: float | None
    record: Record
    selection: KVSelection | None = None  # what decoding attends to now; None = everything
    scratch: dict[Any, Any] = field(default_factory=dict)
    state: dict[Any, Any] = field(default_factory=dict)
    compressor_layers: tuple[LayerSpec, ...] = ()  # the layers that this layer's compressor selects for, in order
    strict: bool = False  # every check is made, whatever it costs (``policy_checks: strict``)

    @property
    def kv_heads(self) -> int:
        """Return the number of KV heads. Does not read the keys, as ``group``, ``total_tokens`` and ``device`` do not."""
        return self.keys.shape[0]

    @property
    def device(self) -> torch.device:
        """Return where the queries and the pairs are."""
        return self.queries.device

    @property
    def group(self) -> int:
        """Return the number of query heads per KV head."""
        return self.queries.shape[0] // self.kv_heads

    @property
    def new_tokens(self) -> int:
        """Return the number of queries, Tq."""
        return self.queries.shape[1]

    @property
    def total_tokens(self) -> int:
        """Return the number of columns, Tk."""
        return self.keys.shape[1]

    @property
    def length(self) -> int:
        """Return the tokens of the conversation so far, evicted ones included."""
        return int(self.head_positions(0)[-1]) + 1

    @property
    def nothing_evicted(self) -> bool:
        """Return whether columns are positions: every head holds every pair of the conversation."""
        return self.positions.dim() == 1 and self.length == self.total_tokens

    def show_selection(self, selection: KVSelection) -> None:
        """Show the selection that was made for this step: for the engine, which shows the same inputs after attention."""
        object.__setattr__(
            self, "selection", selection
        )  # a second object would take longer than a small layer's choice

    @property
    def holds(self) -> Tensor:
        """Return which columns hold a pair, not filler: bool ``[Hkv, Tk]``."""
        columns = torch.arange(self.total_tokens, device=self.device).expand(self.kv_heads, -1)
        return columns >= (0 if self.first_valid is None else self.first_valid[:, None])

    def head_positions(self, head: int) -> Tensor:
        """Return the original positions ``[Tk]`` of one KV head's columns."""
        return self.positions if self.positions.dim() == 1 else self.positions[head]

    def attended(self, selection: KVSelection | None) -> Tensor:
        """Return the columns that a selection and its tail make attended: bool ``[Hkv, Tk]``. None attends to every pair."""
        if selection is None:
            return self.holds
        mask = selection.attended_positions(self.length)
        if self.nothing_evicted:
            return mask
        positions = self.positions.expand(mask.shape[0], -1)
        return mask.gather(1, positions.clamp(min=0)) & (positions >= 0)

    def summarised(self, held: dict[int, KeySummaries], page: int, bits: int = 0) -> KeySummaries:
        """Return summaries of this layer's keys in pages of ``page`` columns, codes of ``bits`` per channel, up to date.

        held: by layer, those of earlier calls; a layer's first ones are put there. A state keeps them, so only new keys are read.
        """
        summaries = held.setdefault(self.layer.index, KeySummaries(page, bits))
        self._update(summaries)
        return summaries

    def request_selection(
        self,
        held: dict[int, KeySummaries],
        page: int,
        bits: int,
        base: KVSelection,
        *,
        most: int,
        least: int = 0,
        threshold: float | None = None,
        observed: Tensor | None = None,
    ) -> SelectionRequest:
        """Return a request for ``base`` and the best other pairs of the last query, by codes of the keys.

        held, page, bits: as in ``summarised``, which need not be called before. The others: see ``kernels.choose_columns``.
        """
        summaries = held.setdefault(self.layer.index, KeySummaries(page, bits))
        keys, first = self._prepare(summaries)
        held_bytes = summaries.nbytes
        self.record.read("summaries", held_bytes)
        self.record.mean("summary_bytes_held", held_bytes)  # per layer, beside the store
        choice = ColumnChoice(
            self.queries[:, -1:],
            summaries.keys_coded,
            base.indices,
            base.boundary,
            most,
            least,
            threshold,
            observed,
            keys,
            first,
        )
        return SelectionRequest(base, summaries, choice, self.scaling, self.softcap, coded=True)

    def _update(self, summaries: KeySummaries) -> None:
        summaries.update(self.keys)

    def _prepare(self, summaries: KeySummaries) -> tuple[Tensor | None, int]:
        """Return the keys that are to be summarised when the selection is made, and from which page on."""
        first = summaries.prepare(self.keys)
        return (None, 0) if first is None else (self.keys, first)

    def changed(self, **fields: Any) -> Self:
        """Return a copy with other fields. It gathers no keys and values, where they are gathered when first asked for."""
        return replace(self, **fields)

    def rows_for(self, pattern: AttentionPattern) -> tuple[Rows, Rows]:
        """Return the keys and values as ``pattern.attend`` takes them: in the blocks of a paged cache only if it reads those."""
        return self.keys, self.values

    def row_attention(self, rows: Tensor, *, kind: str = "scoring") -> LineScores:
        """Return the softmax attention of some rows of this call over all keys, with the masses of the lines.

        Computed once per call; both policies of a layer share the result. rows: int64 ``[r]``, indices into the queries. kind: the
        figure that the bytes read are added to; a sparsifier says ``lines``.
        """
        key = ("rows", tuple(rows.tolist()))
        if key not in self.scratch:
            self.record.read(kind, _bytes(self.keys))
            self.scratch[key] = line_scores(
                self.queries[:, rows],
                self.keys,
                self.columns[rows],
                scaling=self.scaling,
                softcap=self.softcap,
                first_valid=self.first_valid,
            )
        found: LineScores = self.scratch[key]
        return found

    def choose_lines(self, rows: Tensor, **options: Any) -> LineSelection:
        """Return the lines that hold a share of some rows' attention, as ``row_attention`` and ``select_lines`` give together.

        The rows themselves are not kept in memory. rows: int64 ``[r]``, indices into the queries. options: those of
        ``kernels.choose_lines``.
        """
        self.record.read("lines", _bytes(self.keys))
        return choose_lines(
            self.queries[:, rows],
            self.keys,
            self.columns[rows],
            self.new_tokens,
            scaling=self.scaling,
            softcap=self.softcap,
            first_valid=self.first_valid,
            **options,
        )

    def token_scores(self, queries: Tensor, columns: Tensor, *, over_rows: OverRows = "mean") -> Tensor:
        """Return the attention of ``queries`` ``[Hq, r, D]`` at ``columns`` ``[r]`` over the full store: float32 ``[Hkv, Tk]``."""
        self.record.read("scoring", _bytes(self.keys))
        return token_scores(
            queries,
            self.keys,
            columns,
            scaling=self.scaling,
            softcap=self.softcap,
            first_valid=self.first_valid,
            over_rows=over_rows,
        )

    def coverage(self, pattern: AttentionPattern, rows: Tensor) -> Tensor:
        """Return the share of some rows' attention mass that lies inside a pattern, per head: float32 ``[Hq]``.

        rows: int64 ``[r]``, indices into the queries. They are computed a few at a time, to save memory.
        """
        mass = torch.zeros(self.queries.shape[0], dtype=torch.float32, device=self.queries.device)
        for part in rows.split(_COVERAGE_ROWS):
            scores = line_scores(
                self.queries[:, part],
                self.keys,
                self.columns[part],
                scaling=self.scaling,
                softcap=self.softcap,
                first_valid=self.first_valid,
            )
            mass += pattern.coverage(scores.probabilities, self.columns[part]) * len(part)
        return mass / len(rows)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


class PrefillSparsifier(Policy):
    """Choose, for the new tokens of a turn, which cells of the attention matrix are computed."""

    @abstractmethod
    def sparsify(self, inputs: AttentionInputs) -> AttentionPattern:
        """Return the pattern to compute for ``inputs.queries``. Called once per layer and prefill call; it must be causal.

        Write into ``inputs.state`` what later calls need. The session copies it for a fork and restores it with an undo.
        """


@dataclass(frozen=True)
class Observation:
    """Ask the engine to compute these rows of the turn again, so that the compressor sees what they attend to.

    positions: sorted original positions of this turn, int64 ``[r]``. The engine feeds their tokens in one extra pass with phase
    OBSERVE, appends nothing, and then calls ``after_forward`` again.

    again: the tokens follow the conversation a second time instead, behind those of ``prompt``, at the positions after its end. They
    attend to the store and to each other. Their pairs are the last columns of that pass, and are dropped before ``after_forward``.
    Any positions so far may be named, and after the pass others behind them.
    """

    positions: Tensor
    again: bool = False
    prompt: tuple[int, ...] = ()  # token ids


@dataclass(frozen=True)
class Step:
    """Describe one finished forward pass to ``after_forward``."""

    phase: Phase
    turn: int
    turn_start: int
    length: int  # tokens seen so far, those of this call included
    output_index: int  # output tokens of this turn processed so far, this call's included
    final: bool
    layers: tuple[LayerSpec, ...]  # the layers that this compressor selects for
    record: Record


Selections = Mapping[int, KVSelection]
State = TypeVar("State")


class DecodeCompressor(Policy, Generic[State]):
    """Choose which stored pairs decoding attends to. Everything that changes lives in ``state``, which the session owns.

    The engine calls it at three moments of a pass: before and after a layer's attention, and after all layers. Each does nothing
    unless a policy overrides it. Prefill and observation passes make the last two calls as well.
    """

    @property
    def retention(self) -> Retention:
        """Return what happens to unselected pairs under this configuration."""
        return getattr(self.config, "retention", Retention.KEEP)

    @property
    def most_pairs(self) -> int | None:
        """Return the most pairs per KV head, mean over a layer's heads, that a selection makes attended beside this turn's outputs.

        The engine checks every selection against it. None sets no limit. By default the option ``budget``.
        """
        budget = getattr(self.config, "budget", None)
        return budget if type(budget) is int else None

    @property
    def counts_outputs(self) -> bool:
        """Return whether ``budget`` includes this turn's outputs. They are attended on top of it otherwise."""
        return False

    @property
    def dense_below_tokens(self) -> int:
        """Return how many stored pairs a layer may hold and still be decoded dense.

        The engine applies it: while a layer holds at most so many pairs, this policy is not called for it, in no phase. After a
        pass in which no layer held more, ``after_forward`` is not called either. Asked once, when a model is loaded.
        """
        return 0

    @property
    def reads_again(self) -> int:
        """Return the most tokens that one observation with ``again`` reads. Memory is reserved for them."""
        return 0

    @abstractmethod
    def init_state(self) -> State:
        """Return a fresh state for one session. ``copy.deepcopy`` and ``pack_state`` must be able to copy it."""

    def end_turn(self, state: State) -> None:
        """Drop what only the turn that is over needed. Called once per turn, before the next one begins.

        The session keeps a copy of the state for each of its last turns, to restore it with an undo.
        """

    def held_bytes(self, state: State) -> int:
        """Return the bytes that a state holds beside the store (summaries of keys). They count as held by the active set."""
        return 0

    def before_attention(self, inputs: AttentionInputs, state: State) -> KVSelection | SelectionRequest | None:
        """Return a selection for this layer from this decode step on, chosen with the current query, or None to keep the last one.

        A request (``inputs.request_selection``) is carried out for all sessions of a pass together, after this call. It holds the
        selection then.
        """
        return None

    def after_attention(self, inputs: AttentionInputs, state: State) -> None:
        """Observe a layer's call into the state: its queries, and scores computed by methods of ``inputs``."""

    def after_forward(self, step: Step, state: State) -> Selections | Observation | None:
        """Return new selections by layer index, an observation to run, or None to keep the selections. Called after all layers."""
        return None
