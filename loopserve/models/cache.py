"""Give transformers a cache whose pairs live in loopserve's sessions, and lay a pass out in its rows and columns."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, LinearAttentionLayer

from loopserve.core.engine.forward import ForwardContext
from loopserve.core.engine.session import Session
from loopserve.core.errors import ModelError
from loopserve.core.kv.recording import still_plain_tensors
from loopserve.core.policy.layers import LayerSpec
from loopserve.models.recurrent import EmptyLayer, RecurrentCacheLayer

_thread = threading.local()


def last_stored(layer: int) -> Pass | None:
    """Return the pass under way in this thread: the one that the layer has just put its keys and values into."""
    reference = getattr(_thread, "last", None)
    found: Pass | None = None if reference is None else reference()
    return found if found is not None and layer in found.stored else None


def computed_in(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return tensors of one device in the dtype that autocast computes attention in; as they are outside autocast.

    Rotated keys are float32 there and values are not: torch's own attention casts both.
    """
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return tensors
    return tuple(each.to(torch.get_autocast_dtype(kind)) for each in tensors)


@dataclass(frozen=True, eq=False)
class Span:
    """Say where one session's tokens lie in a ``[B, T]`` grid: a row, and a slice or a mask bool ``[T]`` of its columns."""

    context: ForwardContext
    row: int
    columns: slice | Tensor


@dataclass(eq=False)
class Pass:
    """Lay one forward pass out: which cells of the grid are whose. Cells of no session are padding."""

    spans: Sequence[Span]
    stored: dict[int, tuple[Tensor, Tensor]] = field(
        default_factory=dict
    )  # by layer: what the cache was given and returned

    def __post_init__(self) -> None:
        self._lengths = _packed_lengths(self.spans)
        self._packed = sum(self._lengths)

    @property
    def contexts(self) -> list[ForwardContext]:
        """The contexts of the pass, in the order of the spans."""
        return [span.context for span in self.spans]

    def split(self, tensor: Tensor) -> Sequence[Tensor]:
        """Return each session's part ``[H, t, D]`` of a tensor ``[B, H, T, D]``."""
        if tensor.shape[0] == 1 and tensor.shape[2] == self._packed:
            row = tensor[0]
            return [row] if len(self._lengths) == 1 else row.split_with_sizes(self._lengths, 1)
        return [tensor[span.row][:, span.columns] for span in self.spans]

    def join(self, parts: Sequence[Tensor], like: Tensor) -> Tensor:
        """Return ``[B, T, H, D]`` from each session's part ``[H, t, D]``; padding is zero."""
        if len(parts) == 1 and parts[0].shape[1] == like.shape[0] * like.shape[2]:
            return parts[0].transpose(0, 1).unsqueeze(0)
        if like.shape[0] == 1 and like.shape[2] == self._packed:
            return torch.cat(list(parts), dim=1).transpose(0, 1).unsqueeze(0)
        joined = like.new_zeros(like.shape[0], like.shape[2], like.shape[1], parts[0].shape[-1])
        for span, part in zip(self.spans, parts, strict=True):
            joined[span.row, span.columns] = part.transpose(0, 1)
        return joined

    def rotations(self, rows: int, columns: int) -> Tensor:
        """Return the rotation of each cell's conversation, int64 ``[rows, columns]``; 0 in padding."""
        found = torch.zeros(rows, columns, dtype=torch.long, device="cpu")
        for span in self.spans:
            chosen = span.columns.cpu() if isinstance(span.columns, Tensor) else span.columns
            found[span.row, chosen] = span.context.rotation
        return found

    def store(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Hand each session its new pairs of a layer, or keep a latent until the layer attends to the pairs made from it."""
        self.stored[layer] = (keys, values)
        _thread.last = weakref.ref(self)
        if not self.spec(layer).latent:
            self._append(layer, keys, values)

    def spec(self, layer: int) -> LayerSpec:
        """Return the description of a layer."""
        return self.spans[0].context.session.slots.by_layer[layer].spec

    def _append(self, layer: int, keys: Tensor, values: Tensor) -> None:
        keys, values = computed_in(keys, values)
        with still_plain_tensors():
            for span, own_keys, own_values in zip(self.spans, self.split(keys), self.split(values), strict=True):
                span.context.store(layer, own_keys, own_values)

    def require_stored(self, layer: int, module: str, keys: Tensor, values: Tensor) -> None:
        """Raise ModelError unless a layer attends to the very keys and values that it put into the cache in this pass.

        A layer that reads another layer's pairs must be given those. A latent must have been put there; the pairs made from it are
        stored now.
        """
        spec = self.spec(layer)
        kept = self.stored.get(layer if spec.reads is None else spec.reads)
        if kept is None:
            raise ModelError(
                f"layer {layer} ({module}) did not put its keys and values into the cache; "
                "a layer that shares another layer's cache in this way is not supported"
            )
        if spec.latent:
            if keys.shape[2] != kept[0].shape[2]:
                raise ModelError(
                    f"layer {layer} ({module}) makes {keys.shape[2]} keys from a latent of {kept[0].shape[2]} tokens, so this model "
                    "is not supported"
                )
            del self.stored[layer]
            self._append(layer, keys, values)
            return
        for before, now, what in ((kept[0], keys, "keys"), (kept[1], values, "values")):
            same = now is before or (now.data_ptr() == before.data_ptr() and now.shape == before.shape)
            if not same or now.stride() != before.stride():
                raise ModelError(
                    f"layer {layer} ({module}) changes its {what} after they were put into the cache; "
                    "loopserve would attend to the unchanged ones, so this model is not supported"
                )
        if spec.reads is not None:
            self._append(layer, keys, values)
        elif layer not in self._owners:
            del self.stored[layer]

    @property
    def _owners(self) -> frozenset[int]:
        return self.spans[0].context.session.slots.owners


def _packed_lengths(spans: Sequence[Span]) -> list[int]:
    """Tokens of each span where the spans lie one behind another in one row from column 0 on; else no lengths."""
    lengths, end = [], 0
    for span in spans:
        if span.row != 0 or not isinstance(span.columns, slice) or span.columns.start != end:
            return []
        end = span.columns.stop
        lengths.append(end - span.columns.start)
    return lengths


class CacheRows:
    """Hold the sessions behind one transformers cache, one per row."""

    def __init__(self, sessions: Sequence[Session], owner: object = None) -> None:
        """owner: the engine whose sessions they are."""
        self.sessions = list(sessions)
        self.owner = owner
        self.columns = 0  # columns that the caller has fed so far, padding included
        self.valid: Tensor | None = None  # bool [B, columns]: which of them held tokens; None = all
        self.prompt_open = False  # the last pass was a piece of a prompt that goes on
        self.kept = True  # False where the caller wants no cache: the rows serve one pass
        self.under_way: Pass | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> CacheRows:
        other = CacheRows([session.fork() for session in self.sessions], self.owner)
        other.columns, other.valid = self.columns, self.valid
        return other

    def choose(self, rows: Sequence[int]) -> None:
        """Make the rows copies of the chosen rows (beam search)."""
        chosen, taken = [], set()
        for row in rows:
            chosen.append(self.sessions[row].fork() if row in taken else self.sessions[row])
            taken.add(row)
        self.sessions = chosen
        if self.valid is not None:
            self.valid = self.valid[torch.tensor(rows, dtype=torch.long, device=self.valid.device)]


class SessionCacheLayer(DynamicLayer):
    """One layer of a transformers cache. The pairs it is given go to each row's session; it returns them unchanged.

    Transformers works on a cache layer by layer; what concerns the rows as a whole is done by the layer that leads.
    """

    is_croppable = False

    def __init__(self, rows: CacheRows, index: int, *, leads: bool) -> None:
        DynamicLayer.__init__(self)
        self.rows = rows
        self.index = index
        self.leads = leads
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store the new pairs ``[B, Hkv, T, D]``."""
        if key_states.requires_grad:
            raise ModelError("loopserve is for inference: run the model under torch.no_grad() or model.generate()")
        if self.rows.under_way is None:
            raise ModelError("this cache holds loopserve sessions: go on with it inside loopserve.apply(model, stack)")
        self.rows.under_way.store(self.index, key_states, value_states)
        return key_states, value_states

    def get_seq_length(self) -> int:
        """Return the columns fed so far, padding included."""
        return self.rows.columns

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        """Return (columns after this pass, 0)."""
        return self.rows.columns + int(query_length), 0

    def get_max_length(self) -> int:
        """Return -1: there is no limit."""
        return -1

    def reset(self) -> None:
        """Refuse: a session is not emptied in place."""
        raise ModelError("a loopserve cache cannot be reset in place; start a new session")

    def crop(self, *_: Any) -> None:
        """Refuse: a policy's state cannot follow."""
        raise ModelError(
            "assisted and speculative generation take back single tokens, which a policy's state cannot follow"
        )

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Make the rows copies of the chosen rows (beam search)."""
        if self.leads:
            self.rows.choose(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        if self.leads:
            self.rows.choose([row for row in range(len(self.rows.sessions)) for _ in range(repeats)])

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the chosen rows."""
        if self.leads:
            self.rows.choose(indices.tolist())


class RecurrentSessionLayer(SessionCacheLayer, RecurrentCacheLayer):  # type: ignore[misc]  # transformers declares device and dtype twice
    """One layer of a transformers cache that has pairs and recurrent states."""

    def __init__(self, rows: CacheRows, index: int, *, leads: bool, states: int) -> None:
        RecurrentCacheLayer.__init__(self, index, states)
        SessionCacheLayer.__init__(self, rows, index, leads=leads)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Prepare the recurrent states; pairs need no preparation."""
        LinearAttentionLayer.lazy_initialization(self, *args, **kwargs)


def cache_over(rows: CacheRows, layers: Sequence[LayerSpec]) -> Cache:
    """Return a transformers cache over the sessions of some rows."""
    return Cache(layers=_cache_layers(rows, layers))


def _cache_layers(rows: CacheRows, layers: Sequence[LayerSpec]) -> list[Any]:
    leading = next(spec.index for spec in layers if spec.holds_pairs)
    return [_cache_layer(rows, spec, leads=spec.index == leading) for spec in layers]


def _cache_layer(rows: CacheRows, spec: LayerSpec, *, leads: bool) -> Any:
    if spec.recurrent and spec.holds_pairs:
        return RecurrentSessionLayer(rows, spec.index, leads=leads, states=spec.recurrent)
    if spec.recurrent:
        return RecurrentCacheLayer(spec.index, spec.recurrent)
    return SessionCacheLayer(rows, spec.index, leads=leads) if spec.holds_pairs else EmptyLayer()


def rows_of(cache: Cache) -> CacheRows | None:
    """Return the rows behind a cache; None if it is not one over sessions."""
    return next((layer.rows for layer in cache.layers if isinstance(layer, SessionCacheLayer)), None)


def adopt(cache: Cache, rows: CacheRows, layers: Sequence[LayerSpec]) -> None:
    """Turn an empty cache of the caller's into one over the sessions of some rows, so that the caller's own object fills."""
    cache.layers = _cache_layers(rows, layers)
    cache.layer_class_to_replicate = None  # every layer is there already
