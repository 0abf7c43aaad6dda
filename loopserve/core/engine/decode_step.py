"""Select and attend for the decode steps of all sessions of a pass in one layer.

Selections that depend on the current query are requested by the policies and made by one kernel call; a second one attends.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from loopserve.core.engine.forward import ForwardContext, LayerCall
from loopserve.core.engine.policy_calls import failed, inputs_of, keep_apart, observe
from loopserve.core.engine.slots import LayerPolicies
from loopserve.core.guard.faults import FAULTS
from loopserve.core.guard.guard import check_budget, check_selection
from loopserve.core.kv.layer_cache import LayerCache
from loopserve.core.kv.selection import KVSelection
from loopserve.core.kv.selection_request import SelectionRequest, make_selections
from loopserve.core.policy.interfaces import AttentionInputs
from loopserve.kernels.decode_attention import DecodeRequest, decode_attention_batch


class DecodeStep:
    """Hold one session's decode step in one layer.

    request: what the compressor wants selected by the current query. inputs: what it was shown before attention, while true.
    attention: what the kernel is asked; None where the engine that stores the pairs computes the step.
    """

    def __init__(
        self, context: ForwardContext, call: LayerCall, policies: LayerPolicies, queries: Tensor, shown: bool
    ) -> None:
        """Let the compressor select."""
        self.context, self.call, self.policies, self.queries, self.shown = context, call, policies, queries, shown
        self.cache: LayerCache = context.session.cache.layers[policies.spec.index]
        self.inputs: AttentionInputs | None = None
        self.request: SelectionRequest | None = None
        self.attention: DecodeRequest | None = None
        if shown and policies.selects_before:
            self.inputs = inputs_of(context, call, policies, queries)
            self._guarded(self.inputs, self._ask)

    def run(self, part: Callable[[], None]) -> None:
        """Do a part of the step, unless the session is in error. Keep its error in the context, if it is one among several."""
        if self.context.error is None:
            try:
                part()
            except Exception as error:
                keep_apart(self.context, error)

    def take_selection(self) -> None:
        """Attend to the selection that was made for the request."""
        assert self.request is not None and self.inputs is not None
        self._guarded(self.inputs, self._take_made)

    @property
    def fits(self) -> bool:
        """Return whether what the kernel is asked needs no check: the layer's own pairs, and columns that a kernel has just chosen."""
        return not self.context.hosted and (self.request is not None or self.cache.active is None)

    def observe(self) -> None:
        """Let the compressor see the step that is done."""
        if self.policies.observes_after and self.shown:
            observe(
                self.context,
                self.policies,
                self.inputs or inputs_of(self.context, self.call, self.policies, self.queries),
            )

    def settle(self) -> None:
        """Add what is attended to the session's figures, and say what the kernel is asked."""
        session, store, active = self.context.session, self.cache.store, self.cache.active
        assert store is not None
        attended = store.pairs if active is None else active.attended(self.cache.seen)
        dense = store.heads * self.cache.seen
        self.context.compressed |= attended < dense
        session.stats.attended(attended, dense, store.pair_bytes)
        if session.attention_map is not None:
            session.attention_map.add(self.policies.spec.index, *self.cache.attended(), store.heads, self.cache.seen)
        self.attention = self._attention()

    def _attention(self) -> DecodeRequest | None:
        """Return what the kernel is asked: attention over the store, a copy of the selected pairs, or the selected ones in place.

        None where the engine that stores the pairs computes the step.
        """
        store, active = self.cache.store, self.cache.active
        assert store is not None
        if active is None:
            if self.context.hosted:
                return None
            return DecodeRequest(self.queries, store.keys, store.values, self.cache.first_valid)
        if active.pairs is not None:
            return DecodeRequest(self.queries, active.pairs.keys, active.pairs.values, active.first_valid)
        chosen, rows = active.selection, store.rows  # nothing was evicted, so positions are columns
        assert rows is not None
        return DecodeRequest(self.queries, *rows, None, chosen.indices, chosen.boundary)

    def _guarded(self, inputs: AttentionInputs, part: Callable[[AttentionInputs], None]) -> None:
        try:
            part(inputs)
        except FAULTS as error:
            self.request = None
            failed(self.context.session, self.policies.decode_slot, error, "before_attention", inputs)

    def _ask(self, inputs: AttentionInputs) -> None:
        session, policies, compressor = self.context.session, self.policies, self.policies.compressor
        assert compressor is not None and self.cache.store is not None
        state = session.states[policies.decode_slot]
        found = session.guard.ask(compressor, compressor.before_attention, inputs, state)
        if isinstance(found, SelectionRequest):
            found.check(self.queries, self.cache.store.heads, self.cache.seen, self.cache.stored)
            self.request = found
        elif found is not None:
            check_selection(found, self.cache, policies.retention, policies.most_pairs, session.output_index + 1)
            self._attend_to(found, checked=False)
            self.inputs = None  # what they say of the selection, and after an eviction of the store, is no longer true

    def _take_made(self, inputs: AttentionInputs) -> None:
        assert self.request is not None and self.request.selection is not None
        made, most = self.request.selection, self.policies.most_pairs
        check_budget(made, self.cache, most, self.context.session.output_index + 1)
        self._attend_to(made, checked=True)
        inputs.show_selection(made)

    def _attend_to(self, selection: KVSelection, *, checked: bool) -> None:
        self.cache.select(selection, checked=checked)
        self.context.reselected = True


def attend_steps(steps: Mapping[int, DecodeStep], call: LayerCall) -> dict[int, tuple[Tensor, Tensor | None]]:
    """Return the output ``[Hq, 1, D]`` and, for sinks, the log-sum-exp of every step that is not left to another engine."""
    requested = [step for step in steps.values() if step.request is not None and step.context.error is None]
    try:
        make_selections(
            [step.request for step in requested if step.request is not None], scaling=call.scaling, softcap=call.softcap
        )
    except Exception as error:  # each request was checked, so that this is none of a single policy: memory ran out
        for step in requested:
            keep_apart(step.context, error)
    for step in requested:
        step.run(step.take_selection)
    for step in steps.values():
        step.run(step.settle)
    wanted = {
        index: step.attention
        for index, step in steps.items()
        if step.context.error is None and step.attention is not None
    }
    if not wanted:
        return {}
    attended = decode_attention_batch(
        list(wanted.values()),
        scaling=call.scaling,
        softcap=call.softcap,
        need_lse=call.sinks is not None,
        checked=not [index for index in wanted if not steps[index].fits],
    )
    return dict(zip(wanted, attended, strict=True))
