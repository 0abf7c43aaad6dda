"""What a transformers model sees as its cache: a thin view that hands every new pair to our own cache and holds none itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from loopserve.core.attention import Call
from loopserve.core.errors import ModelError
from loopserve.core.session import Session


class _ViewLayer(DynamicLayer):
    """One layer of the view. The pairs it is given go to each row's session; it returns them unchanged."""

    is_croppable = False

    def __init__(self, view: CacheView, index: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._view = view
        self._index = index
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if key_states.requires_grad:
            raise ModelError("loopserve is for inference: run the model under torch.no_grad() or model.generate()")
        for row, call in enumerate(self._view.calls):
            if call is not None:
                keys, values = key_states[row], value_states[row]
                valid = self._view.valid
                if valid is not None:
                    keys, values = keys[:, valid[row]], values[:, valid[row]]
                call.append(self._index, keys, values)
        return key_states, value_states

    def get_seq_length(self) -> int:
        return self._view.padded_length

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        return self._view.padded_length + int(query_length), 0

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        raise ModelError("a loopserve cache cannot be reset in place; start a new session")


class CacheView(Cache):
    """The sessions of a batch, row by row, as one transformers cache."""

    def __init__(self, sessions: Sequence[Session], layers: int, owner: object = None) -> None:
        """owner: whose view it is; another one's is refused."""
        self.sessions = list(sessions)
        self.owner = owner
        self.padded_length = 0  # columns seen by the caller, padding included
        self.calls: list[Call | None] = []
        self.valid: Tensor | None = None  # bool [B, T] of the pass under way; None = no padding
        self.done = True  # the pass's calls have been completed
        super().__init__(layers=[_ViewLayer(self, index) for index in range(layers)])

    def bind(self, calls: Sequence[Call | None], valid: Tensor | None = None) -> None:
        """Name the pass that is about to run. A row without a call has only padding in it."""
        self.calls = list(calls)
        self.valid = valid
        self.done = False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows become copies of the chosen rows (beam search)."""
        chosen, taken = [], set()
        for index in beam_idx.tolist():
            chosen.append(self.sessions[index].fork() if index in taken else self.sessions[index])
            taken.add(index)
        self.sessions = chosen

    def crop(self, *_: Any) -> None:
        raise ModelError(
            "assisted and speculative generation take back single tokens, which a policy's state cannot follow"
        )

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.sessions = [s if n == 0 else s.fork() for s in self.sessions for n in range(repeats)]

    def batch_select_indices(self, indices: Tensor) -> None:
        self.reorder_cache(indices)


def split_rows(view: CacheView, function: Callable[[Call, Tensor], Tensor], queries: Tensor) -> Tensor:
    """Run ``function(call, queries [Hq, T, D]) -> [Hq, T, D]`` on each row without its padding; ``[B, T, Hq, D]``.

    Padding rows come back as zeros. Every row gets exactly what it would get alone.
    """
    if len(view.calls) == 1 and view.valid is None and view.calls[0] is not None:
        return function(view.calls[0], queries[0]).transpose(0, 1).unsqueeze(0)
    output = torch.zeros_like(queries)
    for row, call in enumerate(view.calls):
        if call is None:
            continue
        if view.valid is None:
            output[row] = function(call, queries[row])
        else:
            output[row][:, view.valid[row]] = function(call, queries[row][:, view.valid[row]])
    return output.transpose(1, 2)
