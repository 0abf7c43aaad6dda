"""The two contracts a policy fulfils, and what it is told.

Shapes are those of ONE conversation: queries ``[Hq, Tq, D]``, keys and values ``[Hkv, Tk, D]``, with ``Hq = group * Hkv``.
There is no batch dimension and no padding: the bridge splits a batch into its rows and strips the padding first, so no policy
can get either wrong. A *column* is the index of a stored key; a *position* is its place in the conversation. They differ only
after an eviction.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from loopserve.core.kv.selection import KVSelection as KVSelection
from loopserve.core.kv.selection import Retention as Retention
from loopserve.core.policy.api_version import API_VERSION as API_VERSION
from loopserve.core.policy.api_version import FIRST_API, ApiVersion
from loopserve.core.policy.layers import LayerParts as LayerParts
from loopserve.core.policy.layers import LayerSpec as LayerSpec
from loopserve.core.policy.layers import LayerType as LayerType
from loopserve.core.policy.layers import Need as Need
from loopserve.core.policy.patterns import AttentionPattern
from loopserve.kernels.choose_lines import choose_lines
from loopserve.kernels.line_scores import LineScores, line_scores
from loopserve.kernels.select_lines import LineSelection
from loopserve.kernels.token_scores import OverRows, token_scores


class Phase(StrEnum):
    """Where the engine is. A policy is told; it never guesses from shapes."""

    PREFILL = "prefill"
    OBSERVE = "observe"  # rows of this turn are run again to see what they attend to; nothing is appended
    DECODE = "decode"


class PolicyConfig(BaseModel):
    """Base of every policy's inner ``Config``: frozen, unknown keys refused, each field described."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


@dataclass(frozen=True)
class Capabilities:
    """What a policy can do. A stack that asks for more is refused before any token is computed."""

    layer_types: frozenset[LayerType] = frozenset({LayerType.FULL})
    retentions: frozenset[Retention] = frozenset({Retention.KEEP})
    deterministic: bool = True  # equal inputs and seed give equal choices
    batched: bool = True  # rows of a batch may be served side by side
    passive: bool = False  # leaves every layer as the model has it (dense, full)
    needs: frozenset[Need] = frozenset()  # what it asks beyond queries, keys and values


class Record(Protocol):
    """Where a policy reports what it did; the session owns it (see ``core.stats``)."""

    def count(self, name: str, amount: float = 1.0) -> None:
        """Add to a counter of this turn, e.g. ``fallback:short_turn``."""

    def mean(self, name: str, value: float | Tensor) -> None:
        """Add one or more values to a mean of this turn, e.g. ``coverage_estimated``."""

    def read(self, kind: str, amount: float) -> None:
        """Bytes of keys, values or summaries read from the cache, by kind (``attended``, ``scoring``, ``summaries``)."""


@dataclass(frozen=True, eq=False)
class AttentionInputs:
    """Everything about one attention call of one layer.

    queries ``[Hq, Tq, D]`` (rotated), keys and values ``[Hkv, Tk, D]``: the whole store, this call's own pairs included.
    columns ``[Tq]``: where the queries stand among the keys (the last Tq in prefill and decode; any in an observation).
    positions ``[Tk]`` or ``[Hkv, Tk]`` (after an eviction heads differ): original positions, strictly increasing per head.
    first_valid ``[Hkv]`` or None: columns before it are filler of a head that holds fewer pairs; never attended.
    """

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
    state: dict[Any, Any] = field(default_factory=dict)  # what the sparsifier keeps in mind for this session
    ruled: tuple[LayerSpec, ...] = ()  # the layers that this layer's compressor rules, in order
    strict: bool = False  # every check is made, whatever it costs (``policy_checks: strict``)

    @property
    def group(self) -> int:
        return self.queries.shape[0] // self.keys.shape[0]

    @property
    def new_tokens(self) -> int:
        return self.queries.shape[1]

    @property
    def total_tokens(self) -> int:
        return self.keys.shape[1]

    @property
    def length(self) -> int:
        """Tokens of the conversation so far, evicted ones included."""
        return int(self.head_positions(0)[-1]) + 1

    @property
    def holds(self) -> Tensor:
        """Columns that hold a pair, not filler: bool ``[Hkv, Tk]``."""
        columns = torch.arange(self.total_tokens, device=self.keys.device).expand(self.keys.shape[0], -1)
        return columns >= (0 if self.first_valid is None else self.first_valid[:, None])

    def head_positions(self, head: int) -> Tensor:
        """Original positions ``[Tk]`` of one KV head's columns."""
        return self.positions if self.positions.dim() == 1 else self.positions[head]

    def row_attention(self, rows: Tensor, *, kind: str = "scoring") -> LineScores:
        """Softmax attention of some rows of this call over all keys, with the masses of the lines; computed once per call.

        rows: int64 ``[r]``, indices into the queries. Both policies of a layer share the result. kind: what the reading of the
        keys counts as; a sparsifier says ``lines``.
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
        """Lines that hold a share of some rows' attention: what ``row_attention`` and ``select_lines`` give together, without keeping
        the rows.

        rows: int64 ``[r]``, indices into the queries. options: those of ``kernels.choose_lines``.
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
        """Attention of ``queries`` ``[Hq, r, D]`` standing at ``columns`` over the full store, per KV head: float32 ``[Hkv, Tk]``."""
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


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


class PrefillSparsifier(ABC):
    """Chooses, for the new tokens of a turn, which cells of the attention matrix are computed. Immutable and shared.

    A concrete policy sets ``name`` (snake_case) and ``paper`` (a link; "" where there is none) in its own class, and the
    ``api_version`` it was written for.
    """

    api_version: ClassVar[ApiVersion] = FIRST_API
    name: ClassVar[str]
    paper: ClassVar[str]
    capabilities: ClassVar[Capabilities] = Capabilities()

    class Config(PolicyConfig):
        """No options."""

    def __init__(self, config: PolicyConfig | None = None) -> None:
        self.config = config if config is not None else self.Config()

    @property
    def effective_capabilities(self) -> Capabilities:
        """What this very object can do."""
        return self.capabilities

    def refuses(self, layer: LayerSpec) -> str | None:
        """Why this policy, configured as it is, cannot serve a layer; asked once, when a model is loaded."""
        return None

    @abstractmethod
    def sparsify(self, inputs: AttentionInputs) -> AttentionPattern:
        """The pattern to compute for ``inputs.queries``. Called once per layer and prefill call; it must be causal.

        What is to outlast the call goes into ``inputs.state``, which the session owns, copies and takes back.
        """


@dataclass(frozen=True)
class Observation:
    """A compressor's wish: run these rows of the conversation again, see what they attend to, append nothing.

    positions: sorted original positions of this turn, int64 ``[r]``. The engine feeds their tokens in one extra pass with phase
    OBSERVE and then asks ``after_forward`` again.
    """

    positions: Tensor


@dataclass(frozen=True)
class Step:
    """One finished forward pass, as ``after_forward`` sees it."""

    phase: Phase
    turn: int
    turn_start: int
    length: int  # tokens seen so far, those of this call included
    output_index: int  # output tokens of this turn processed so far, this call's included
    final: bool
    layers: tuple[LayerSpec, ...]  # the layers this compressor rules
    record: Record


Selections = Mapping[int, KVSelection]
State = TypeVar("State")


class DecodeCompressor(ABC, Generic[State]):
    """Chooses which stored pairs decoding attends to. Immutable and shared: what changes lives in ``state``, owned by the session.

    Three moments of a pass, each doing nothing unless a policy says otherwise. Prefill and observation passes call the last two as
    well.
    """

    api_version: ClassVar[ApiVersion] = FIRST_API
    name: ClassVar[str]
    paper: ClassVar[str]
    capabilities: ClassVar[Capabilities] = Capabilities()

    class Config(PolicyConfig):
        """No options."""

    def __init__(self, config: PolicyConfig | None = None) -> None:
        self.config = config if config is not None else self.Config()

    @property
    def effective_capabilities(self) -> Capabilities:
        """What this very object can do; a wrapper's depends on what it wraps."""
        return self.capabilities

    def refuses(self, layer: LayerSpec) -> str | None:
        """Why this policy, configured as it is, cannot serve a layer; asked once, when a model is loaded."""
        return None

    @property
    def retention(self) -> Retention:
        """What happens to unselected pairs under this configuration."""
        return getattr(self.config, "retention", Retention.KEEP)

    @property
    def most_pairs(self) -> int | None:
        """Most pairs per KV head, mean over a layer's heads, that a selection makes attended beside this answer's outputs.

        The engine holds a policy to it; None = it promises nothing. By default the option ``budget``.
        """
        budget = getattr(self.config, "budget", None)
        return budget if type(budget) is int else None

    @property
    def counts_outputs(self) -> bool:
        """Whether ``budget`` counts this answer's outputs in, which are attended on top of it otherwise. Equal shares depend on it."""
        return False

    @property
    def dense_below_tokens(self) -> int:
        """Decode steps over at most so many stored pairs are dense and not shown to this policy, which costs nothing then:
        ``before_attention`` and ``after_attention`` are not called in them. Asked once, when a model is loaded.
        """
        return 0

    @abstractmethod
    def init_state(self) -> State:
        """A fresh state for one session. It must survive ``copy.deepcopy`` (a session can be forked)."""

    def end_turn(self, state: State) -> None:
        """A turn is over: let go of what only it needed. Called once per turn, before the next one begins.

        When that one begins the state is copied, to go back to if it is taken back, and there is such a copy for every turn of
        the conversation.
        """

    def held_bytes(self, state: State) -> int:
        """Bytes a state holds beside the store (summaries of keys); they count as held by the active set."""
        return 0

    def before_attention(self, inputs: AttentionInputs, state: State) -> KVSelection | None:
        """In decoding, with the current query at hand: a new selection for this layer and from this very step on, or None."""
        return None

    def after_attention(self, inputs: AttentionInputs, state: State) -> None:
        """Observe a layer's call (its queries, and scores asked of ``inputs``) into the state."""

    def after_forward(self, step: Step, state: State) -> Selections | Observation | None:
        """Once after all layers: new selections by layer index, the wish for an observation pass, or None (keep as it is)."""
        return None
