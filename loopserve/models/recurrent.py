"""Give transformers the recurrent and convolution states of loopserve's sessions, and take them back after a pass.

A state lives in its session, without a batch dimension. Models write into the tensors that they are given.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import cache_utils
from transformers.cache_utils import Cache, LinearAttentionLayer

from loopserve.core.engine.session import Session
from loopserve.core.errors import CacheError, ModelError
from loopserve.core.kv.recording import plain_tensors

EmptyLayer: Callable[[], Any] = getattr(
    cache_utils, "DummyLayer", LinearAttentionLayer
)  # of a layer that keeps nothing


class RecurrentCacheLayer(LinearAttentionLayer):
    """One layer of a transformers cache that holds the states of each row's session for the time of a pass."""

    def __init__(self, index: int, states: int) -> None:
        """states: recurrent or convolution states that the layer keeps."""
        LinearAttentionLayer.__init__(self, number_of_states=states)
        self.index = index

    def load(self, sessions: list[Session]) -> None:
        """Take over the states of the rows' sessions, or begin empty where these hold no token."""
        held = [session.cache.recurrent.get(self.index) for session in sessions]
        for session, states in zip(sessions, held, strict=True):
            if states is None and session.cache.seen:
                raise CacheError(f"layer {self.index}: the state after {session.cache.seen} tokens is not there")
        self._forget()
        present = [each for each in held if each is not None]
        if not present:
            return
        if len(present) < len(held):
            raise ModelError(
                "rows of one batch must begin together in a model with recurrent layers: start them without past_key_values"
            )
        for name in present[0]:
            whole = present[0][name][None] if len(held) == 1 else torch.stack([each[name] for each in present])
            self._put(name, whole)

    def save(self, sessions: list[Session]) -> None:
        """Hand each row's session its states. ModelError if the layer did not use the cache for them."""
        states = self._named()
        if not states:
            raise ModelError(
                f"layer {self.index} keeps its recurrent state in another way than in transformers' cache, so this model is not "
                "supported"
            )
        for row, session in enumerate(sessions):
            session.cache.recurrent[self.index] = {name: _plain(each[row]) for name, each in states.items()}
        self._forget()

    def _forget(self) -> None:
        states = range(self.number_of_states)
        self.conv_states, self.recurrent_states = dict.fromkeys(states), dict.fromkeys(states)
        self.is_conv_states_initialized = dict.fromkeys(states, False)
        self.is_recurrent_states_initialized = dict.fromkeys(states, False)
        self.has_previous_state = dict.fromkeys(states, False)
        self.conv_kernel_size = dict.fromkeys(states)

    def _named(self) -> dict[str, Tensor]:
        named = {f"conv:{place}": each for place, each in self.conv_states.items() if each is not None}
        named |= {f"recurrent:{place}": each for place, each in self.recurrent_states.items() if each is not None}
        return named

    def _put(self, name: str, whole: Tensor) -> None:
        kind, _, number = name.partition(":")
        place = int(number)
        self.has_previous_state[place] = True
        if kind == "conv":
            layer: Any = self  # transformers declares these as None
            layer.dtype, layer.device = whole.dtype, whole.device
            self.conv_states[place], self.is_conv_states_initialized[place] = whole, True
            self.conv_kernel_size[place] = whole.shape[-1]
        else:
            self.recurrent_states[place], self.is_recurrent_states_initialized[place] = whole, True

    # The rows as a whole are the business of an attention layer, which forks and drops sessions.

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Do nothing: the sessions behind the rows are chosen."""

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Do nothing: the sessions behind the rows are chosen."""

    def batch_select_indices(self, indices: Tensor) -> None:
        """Do nothing: the sessions behind the rows are chosen."""


def _plain(state: Tensor) -> Tensor:
    """Return a state that can be written to outside inference mode as well."""
    if not state.is_inference():
        return state.detach()
    with plain_tensors():
        return state.clone()


def load_states(cache: Cache, sessions: list[Session]) -> None:
    """Put the states of the rows' sessions into a cache, before a pass."""
    for layer in cache.layers:
        if isinstance(layer, RecurrentCacheLayer):
            layer.load(sessions)


def save_states(cache: Cache, sessions: list[Session]) -> None:
    """Take the states out of a cache into the rows' sessions, after a pass."""
    for layer in cache.layers:
        if isinstance(layer, RecurrentCacheLayer):
            layer.save(sessions)
