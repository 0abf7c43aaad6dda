"""Describe one forward pass over the tokens of one or several sessions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from loopserve.core.engine.session import Session
from loopserve.core.kv.recording import plain_tensors
from loopserve.core.policy.deferred import Gathered
from loopserve.core.policy.interfaces import Observation, Phase
from loopserve.core.policy.layers import LayerSpec


@dataclass(eq=False)
class ForwardContext:
    """Hold one session's share of a forward pass: which tokens, at which positions, and what its layers report back."""

    session: Session
    phase: Phase
    token_ids: Sequence[int]
    positions: Tensor  # int64 [T], original positions of the tokens
    stored_after: int  # tokens that every layer of the session holds once the pass is done
    rotation: int = 0  # what ``Model.rotation`` says of the length of the conversation that the tokens belong to
    final: bool = True  # False for every piece of a chunked prefill but the last
    observer: str | None = None  # slot of the compressor that an observation pass is for
    again: Observation | None = (
        None  # an observation whose tokens are read behind the conversation, and dropped after the pass
    )
    measure: bool = False  # measure realised coverage over all rows, as costly as dense attention
    hosted: bool = False  # another engine stores the pairs, and computes the layers whose attention is dense
    gathered: Gathered | None = None  # what the layer under way has gathered from a store that is not in place
    isolated: bool = False  # several sessions share the pass: an error of this one must not end it
    compressed: bool = False  # some layer attended to a selection
    reselected: bool = False  # some layer was given another selection
    counted: bool = False  # its decode step is in the figures
    shown: set[str] = field(default_factory=set)  # slots whose compressors were called for some layer
    error: BaseException | None = None  # set while isolated; the session takes no further part in the pass
    scratch: dict[int, dict[Any, Any]] = field(default_factory=dict)  # by layer: what policies compute once per call

    @plain_tensors()
    def append(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Store the new pairs ``[Hkv, T, D]`` of a layer, wherever it is called. See ``store``."""
        self.store(layer, keys, values)

    def store(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Store the new pairs ``[Hkv, T, D]`` of a layer, within ``plain_tensors``.

        An observation adds none, unless it reads its tokens again.
        """
        if (self.phase is Phase.OBSERVE and self.again is None) or self.error is not None:
            return
        try:
            self.session.cache.layers[layer].append(keys, values)
        except Exception as error:
            if not self.isolated:
                raise
            self.error = error


class ForwardBatch:
    """Gather the contexts of one forward pass; a session appears in it at most once."""

    def __init__(self, contexts: Sequence[ForwardContext]) -> None:
        self.contexts = list(contexts)
        for context in self.contexts:
            context.isolated = len(self.contexts) > 1

    @property
    def token_ids(self) -> Tensor:
        """All tokens of the pass, int64 ``[sum T]`` on the CPU."""
        return torch.tensor(
            [token for each in self.contexts for token in each.token_ids], dtype=torch.long, device="cpu"
        )

    @property
    def positions(self) -> Tensor:
        """The positions that the model rotates all tokens by, int64 ``[sum T]``."""
        return torch.cat([each.positions + each.session.position_offset for each in self.contexts])

    @property
    def spans(self) -> list[slice]:
        """Where each context's tokens lie in the packed row."""
        found, start = [], 0
        for each in self.contexts:
            found.append(slice(start, start + len(each.token_ids)))
            start = found[-1].stop
        return found


@dataclass(frozen=True)
class LayerCall:
    """Hold what one layer of the model asks for, equal for all sessions of a pass.

    window: sliding window in tokens, own token included. sinks ``[Hq]``: logits of a virtual key without value that only takes
    mass (gpt-oss).
    """

    layer: int
    scaling: float
    softcap: float | None = None
    window: int | None = None
    sinks: Tensor | None = None


class Model(Protocol):
    """Declare what the engine needs of a language model. ``models.bridge.TransformersModel`` implements it."""

    @property
    def layers(self) -> Sequence[LayerSpec]:
        """One entry per attention layer, in order."""

    @property
    def max_positions(self) -> int | None:
        """Longest conversation in tokens; None if there is no limit."""

    @property
    def rotation_grows(self) -> bool:
        """Whether tokens of one answer may be rotated differently: stored pairs stay as they are until the next turn."""

    def rotation(self, tokens: int) -> int:
        """Return what stands for the rotation of a conversation of so many tokens; 0 where it does not depend on the length."""

    @property
    def device(self) -> torch.device:
        """Where token ids and positions go."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of keys and values."""

    @property
    def vocabulary(self) -> int:
        """How many token ids there are."""

    def forward(self, batch: ForwardBatch) -> Tensor:
        """Run one pass; return the logits of each context's last token, ``[contexts, vocabulary]``."""
