"""Run a stack's policies inside another engine, over pairs that it stores (paged, for instance).

The host owns the model, the pairs and the sampling. For every pass it asks a turn for a context, hands each layer's new pairs
and queries to it, computes what is left to it, and ends the pass::

    context = turn.begin_pass(new_tokens)
    for layer in layers:
        context.append(layer, keys, values)             # after the host has stored them
        outputs = attend_hosted([context], LayerCall(layer, scaling), [queries])   # None: the host computes dense attention
    turn.end_pass(context)

Turns of several conversations may share a pass: ``attend_hosted`` takes all their contexts. A turn shares nothing that changes
with another one. Policies that evict, or have rows computed again, cannot run here; ``require_hosted`` refuses them by name.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from loopserve.core.engine.attention import attend_sparse
from loopserve.core.engine.forward import ForwardContext, LayerCall
from loopserve.core.engine.session import Session
from loopserve.core.engine.slots import Slots
from loopserve.core.engine.stats import TurnStats
from loopserve.core.engine.turn import ask_compressors
from loopserve.core.errors import ConfigError
from loopserve.core.guard.guard import Guard
from loopserve.core.kv.buffers import PairStore
from loopserve.core.kv.recording import plain_tensors
from loopserve.core.kv.selection import Retention
from loopserve.core.policy.interfaces import Phase
from loopserve.core.policy.layers import LayerSpec
from loopserve.core.stack.stack import PolicyStack


def require_hosted(stack: PolicyStack, layers: Sequence[LayerSpec]) -> Slots:
    """Return the policies of each layer. Raises ConfigError, naming policy and remedy, for a stack that no host can run.

    layers: declare them with ``repeatable=False``, since a host computes no row again.
    """
    stack.check(layers, batch=True)
    slots = Slots(layers, stack)
    evicting = [
        each.compressor.name for each in slots.by_layer if each.compressor and each.retention is Retention.EVICT
    ]
    if evicting:
        raise ConfigError(
            f"stack {stack.name!r}: decode policy {evicting[0]!r} evicts pairs, which another engine stores and shares between "
            "conversations: set its retention to keep, or choose another stack"
        )
    return slots


@plain_tensors()
def attend_hosted(
    contexts: Sequence[ForwardContext], call: LayerCall, queries: Sequence[Tensor]
) -> list[Tensor | None]:
    """Return one layer's attention output ``[Hq, T, D]`` per turn, for its rotated queries ``[Hq, T, D]``.

    None where every pair is attended, or the turn is in error: the host computes it.
    """
    return attend_sparse(contexts, call, queries)


class HostedTurn:
    """Hold one request of the host: the states of its policies, their selections, and its figures."""

    @plain_tensors()
    def __init__(
        self, slots: Slots, guard: Guard, stores: Sequence[PairStore], tokens: Sequence[int], *, stored: int = 0
    ) -> None:
        """Begin a turn of ``tokens`` that are known, the first ``stored`` of which have their pairs already.

        stores: one per layer. guard: with ``on_fault: dense``, so that a fault of a policy costs no more than its saving.
        """
        session = Session(slots, guard)
        session.tokens = list(tokens[:stored])
        for layer, store in zip(session.cache.layers, stores, strict=True):
            store.length = layer.seen = stored
            layer.store = store
        session.begin_turn(tokens[stored:], undoable=False)
        self.session = session
        self.seen = self.stored = stored
        self.prefill_end = len(tokens)

    @property
    def stats(self) -> TurnStats:
        """Return the figures of the turn so far."""
        return self.session.stats

    @plain_tensors()
    def begin_pass(self, tokens: int) -> ForwardContext:
        """Return the context of a pass over the next ``tokens`` tokens: prefill up to those known at the start, then decoding."""
        start, end = self.seen, self.seen + tokens
        phase = Phase.PREFILL if start < self.prefill_end else Phase.DECODE
        self.session.enter(phase)
        return ForwardContext(
            self.session,
            phase,
            self.session.tokens[start:end],
            torch.arange(start, end, device="cpu"),
            stored_after=end,
            final=end >= self.prefill_end,
            hosted=True,
            isolated=True,
        )

    @plain_tensors()
    def end_pass(self, context: ForwardContext) -> None:
        """Let the compressors answer, once every layer has been called. Raises what ended the turn's share of the pass."""
        if context.error is not None:
            raise context.error
        self.seen = context.stored_after
        ask_compressors(context)
        self.stats.output_tokens += context.final  # the host takes a token from the logits of such a pass

    def close(self) -> None:
        """Drop the states and let go of the stores; the figures stay."""
        self.session.close()
