"""Implement LoopServe, phase two: progressive KV compression."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from loopserve.core.kv.key_summaries import KeySummaries
from loopserve.core.kv.selection import KVSelection, Retention
from loopserve.core.kv.selection_request import SelectionRequest
from loopserve.core.policy.base import Capabilities
from loopserve.core.policy.interfaces import AttentionInputs, DecodeCompressor, Observation, Phase, Selections, Step
from loopserve.kernels.key_codes import log_weights
from loopserve.policies.decode.loopserve.config import (
    FirstBlock,
    LoopServeDecodeConfig,
    Pool,
    Rescore,
    Scope,
    SecondHop,
    Trigger,
)
from loopserve.policies.decode.loopserve.memory import (
    ScoreAccumulator,
    by_position,
    captured_share,
    choose,
    looked_at_most,
    overlap,
    unit_of,
)
from loopserve.policies.decode.loopserve.probe import DriftReference, QueryProbe, same, selection_of
from loopserve.policies.decode.loopserve.threshold import ThresholdController
from loopserve.policies.draws import generator, uniform_rows


@dataclass
class LoopServeState:
    """Hold one turn's observations and selections. All of it except the key summaries is empty when the next turn begins.

    Dictionaries are by layer. first_hop_scores ``[length]``: attention of the last rows to each token, summed over heads and
    layers. layer_scores ``[Hkv, length]``: of the current observation. output_queries ``[Hq, 1, D]`` each: of this turn's last
    outputs. code_scores ``[Hkv, boundary]``: summed since the last selection (``rescore: codes``). layer_inputs, requests: the
    layers of the current pass and what was selected for them, views of the store; empty between two turns.
    """

    input_end: int = 0  # length of the conversation after this turn's prefill
    selected_at: int = 0  # output index of the last selection
    observing: bool = False  # an observation pass was requested
    drifted: bool = False  # some layer noticed drift in the current pass
    scores: ScoreAccumulator = field(default_factory=ScoreAccumulator)
    first_hop_scores: Tensor | None = None
    layer_scores: dict[int, Tensor] = field(default_factory=dict)
    selections: dict[int, KVSelection] = field(default_factory=dict)
    drift_references: dict[int, DriftReference] = field(default_factory=dict)
    output_queries: dict[int, deque[Tensor]] = field(default_factory=dict)
    code_scores: dict[int, Tensor] = field(default_factory=dict)
    controller: ThresholdController = field(default_factory=ThresholdController)
    key_summaries: dict[int, KeySummaries] = field(default_factory=dict)
    layer_inputs: dict[int, AttentionInputs] = field(default_factory=dict)
    requests: list[SelectionRequest] = field(default_factory=list)


def _over_group(scores: Tensor, inputs: AttentionInputs) -> Tensor:
    """Return the mean over each group of query heads: ``[Hq, Tk]`` to ``[Hkv, Tk]``."""
    return scores.view(-1, inputs.group, inputs.total_tokens).mean(1)


class LoopServeDecode(DecodeCompressor[LoopServeState]):
    """Score the last output queries against the full store every few outputs, and attend to the best pairs (LoopServe).

    Paper: LoopServe, https://arxiv.org/abs/2507.13681, progressive KV compression: every n_d outputs the last n_d output queries
    are scored over all keys, the group's mean ranks the pairs, and each KV head attends to the best B of them and to this turn's
    outputs.

    Variant and deviations: the paper's code is not public. The first selection of an answer (``first_block``) and the number of
    scored queries are interpretations. Additions, each an option with a value that disables it: two-hop first observation (the rows
    of the turn that the last rows attend to most are observed in an extra pass), a decaying maximum over observations (``memory``),
    one selection for several heads or layers (``share``), pooling, sinks and recent window, outputs that compete for the budget
    (``scope: all``), re-selection on drift, and a part of the budget that each step gives to the best pairs of its own query: pages
    by Quest's bounds (``page_budget``, https://arxiv.org/abs/2406.10774), or single tokens by codes of the keys (``key_bits``),
    which can be used for re-selection as well (``rescore``). Short conversations are decoded dense (``dense_below``). The preset
    ``loopserve-paper`` disables all additions. The preset ``loopserve`` enables those that improved measured results.

    Drift is estimated by ``probe.QueryProbe.captured``: by the keys' codes, or by page bounds calibrated at each selection. A layer
    with drift selects again within the step, and all layers do so after it.

    Multi-turn: a new turn's prefill sees the whole store (``pool: full``), and its answer's first selection is made again over
    history and new turn. Unselected pairs can be selected at any later time. With ``pool: active`` unselected pairs are evicted,
    and later turns see survivors only.
    """

    name: ClassVar[str] = "loopserve"
    paper: ClassVar[str] = "https://arxiv.org/abs/2507.13681"
    capabilities: ClassVar[Capabilities] = Capabilities(retentions=frozenset(Retention))

    class Config(LoopServeDecodeConfig):
        """Take the options of ``config.LoopServeDecodeConfig``."""

    config: LoopServeDecodeConfig

    @property
    def effective_capabilities(self) -> Capabilities:
        return replace(self.capabilities, observes=self.config.first_block is FirstBlock.TWO_HOP)

    @property
    def retention(self) -> Retention:
        return Retention.EVICT if self.config.pool is Pool.ACTIVE else Retention.KEEP

    @property
    def most_pairs(self) -> int:
        config = self.config
        return config.budget - config.page_budget + config.most_page_pairs if config.by_threshold else config.budget

    @property
    def counts_outputs(self) -> bool:
        return self.config.scope is Scope.ALL

    @property
    def dense_below_tokens(self) -> int:
        return int(self.config.budget * self.config.dense_below)

    def init_state(self) -> LoopServeState:
        return LoopServeState()

    def end_turn(self, state: LoopServeState) -> None:
        state.__dict__.update(LoopServeState(key_summaries=state.key_summaries).__dict__)

    def held_bytes(self, state: LoopServeState) -> int:
        return sum(each.nbytes for each in state.key_summaries.values() if each.columns)

    # Before a layer's attention: the steps that depend on the current query.

    def before_attention(self, inputs: AttentionInputs, state: LoopServeState) -> KVSelection | SelectionRequest | None:
        """Return the selection with the best pairs of the current query added. Select again if the selection has drifted from that
        query.
        """
        config, layer = self.config, inputs.layer.index
        base = state.selections.get(layer)
        if base is None or not self._looks_within_the_step():
            return None
        if config.key_bits and config.trigger is Trigger.INTERVAL:
            return self._jump(inputs, base, state)
        probe = self._probe(inputs, state)
        columns = probe.with_jumps(base, config.page_budget)
        if layer in state.drift_references and inputs.output_index + 1 - state.selected_at >= config.drift_min_interval:
            estimate = probe.captured(columns, state.drift_references[layer])
            inputs.record.mean("drift_captured", estimate)
            if state.drift_references[layer].found(estimate, config.drift_threshold):
                base = self._select_within_step(inputs, state) or base
                columns = probe.with_jumps(base, config.page_budget)
                state.drift_references[layer] = probe.calibrated(columns)
        selection = selection_of(columns, inputs, base)
        return None if same(inputs.selection, selection) else selection

    def _jump(self, inputs: AttentionInputs, base: KVSelection, state: LoopServeState) -> SelectionRequest:
        """Request the base and the best pairs of the current query by the keys' codes, attended in place.

        Nothing is evicted under ``page_budget``, so positions are columns and no head holds filler.
        """
        config, controller = self.config, state.controller
        observed = None
        if config.rescore is Rescore.CODES:
            observed = state.code_scores.get(inputs.layer.index)
            if observed is None or observed.shape[1] != base.boundary:
                shape = base.indices.shape[0], base.boundary
                observed = torch.zeros(shape, dtype=torch.float32, device=inputs.device)
                state.code_scores[inputs.layer.index] = observed
        free = base.boundary - base.indices.shape[1]
        least = most = min(config.page_budget, free)
        if config.by_threshold:
            assert controller.log_threshold is not None
            least = min(int(config.page_budget_least * config.page_budget), free)
            most = min(config.most_page_pairs, free)
        request = inputs.request_selection(
            state.key_summaries,
            config.page,
            config.key_bits,
            base,
            most=most,
            least=least,
            threshold=controller.log_threshold if config.by_threshold else None,
            observed=observed,
        )
        state.requests.append(request)
        return request

    def _move_threshold(self, step: Step, state: LoopServeState) -> None:
        """Move the threshold by the pairs that the step's selections attend to."""
        if self.config.by_threshold:
            for request in state.requests:
                if request.selection is None:
                    continue
                heads, width = request.base.indices.shape
                tail = step.length - request.base.boundary if self.counts_outputs else 0
                state.controller.add(request.selection.pairs + heads * (tail - width), heads)
            state.controller.end_step(self.config.page_budget)
        state.requests = []

    def _begin_threshold(self, state: LoopServeState) -> None:
        """Choose the first threshold by the last query of each layer, which the first output's will resemble."""
        weights = []
        for layer, selection in state.selections.items():
            call = state.layer_inputs[layer]
            found = log_weights(self._probe(call, state).logits)[:, : selection.boundary]
            weights.append(found.scatter(1, selection.indices, float("-inf")))
        state.controller.begin(weights, self.config.page_budget)

    def _looks_within_the_step(self) -> bool:
        return bool(self.config.page_budget) or self.config.trigger is Trigger.DRIFT

    def _summaries(self, inputs: AttentionInputs, state: LoopServeState) -> KeySummaries:
        """Update the layer's summaries and return them."""
        return inputs.summarised(state.key_summaries, self.config.page, self.config.key_bits)

    def _probe(self, inputs: AttentionInputs, state: LoopServeState) -> QueryProbe:
        return QueryProbe.at(inputs, self._summaries(inputs, state))

    def _select_within_step(self, inputs: AttentionInputs, state: LoopServeState) -> KVSelection | None:
        """Return a selection for this layer alone, by the current query and those before it. The other layers are selected after
        the pass.
        """
        layer = inputs.layer.index
        state.drifted = True
        inputs.record.count("drift")
        state.layer_scores[layer] = self._score(inputs, [*state.output_queries.get(layer, ()), inputs.queries])
        scores = state.scores.with_one(self.config, layer, state.layer_scores[layer])
        base = choose(self.config, scores, inputs, self._boundary(inputs, state))
        if base is not None:
            state.selections[layer] = base
        return base

    # After a layer's attention: observation.

    def after_attention(self, inputs: AttentionInputs, state: LoopServeState) -> None:
        layer = inputs.layer.index
        if inputs.phase is Phase.PREFILL:
            if self._looks_within_the_step():
                self._summaries(inputs, state)  # updated in prefill, so that the first output does not wait
            if inputs.final:
                self._observe_prefill(inputs, state)
        elif inputs.phase is Phase.DECODE:
            kept = state.output_queries.setdefault(layer, deque(maxlen=self.config.window or self.config.interval))
            kept.append(inputs.queries.detach())
            state.layer_inputs[layer] = inputs
        elif state.observing and layer in state.layer_inputs:
            self._take(inputs, state, inputs.queries, inputs.columns)

    def _observe_prefill(self, inputs: AttentionInputs, state: LoopServeState) -> None:
        """Make the turn's first observation."""
        config = self.config
        if config.first_block is FirstBlock.DENSE:
            return
        call = inputs.changed(scratch={})
        if config.first_block is not FirstBlock.TWO_HOP or config.second_hop is SecondHop.AGAIN:
            # Only the last query is kept, for drift. All queries of a long turn would take more memory than its keys.
            call = call.changed(queries=inputs.queries[:, -1:].detach().clone(), columns=inputs.columns[-1:])
        state.layer_inputs[inputs.layer.index] = call
        if config.first_block is FirstBlock.SAMPLED:
            source = generator(config.seed, inputs.turn, inputs.layer.index, inputs.total_tokens)
            rows = uniform_rows(torch.arange(inputs.new_tokens, device="cpu"), config.hop_rows, source).to(
                inputs.queries.device
            )
            per_query = inputs.row_attention(rows).probabilities.amax(1)
            self._add(inputs, state, _over_group(per_query, inputs))
            return
        last = torch.arange(inputs.new_tokens, device=inputs.queries.device)[-config.hop_window :]
        if config.first_block is FirstBlock.LAST_WINDOW:
            rows, columns = inputs.queries[:, last], inputs.columns[last]
            self._add(inputs, state, inputs.token_scores(rows, columns, over_rows=config.rows.value))
            return
        # One read of the keys gives both: the keys that the rows attend to most, and the rows of the turn among them.
        scores = inputs.token_scores(inputs.queries[:, last], inputs.columns[last], over_rows="max")
        self._add(inputs, state, scores)
        looked_at = by_position(scores, inputs).sum(0)
        state.first_hop_scores = looked_at if state.first_hop_scores is None else state.first_hop_scores + looked_at

    def _take(self, inputs: AttentionInputs, state: LoopServeState, queries: Tensor, columns: Tensor) -> None:
        """Add the attention of some rows of the turn to the current observation: the maximum over the rows."""
        self._add(inputs, state, inputs.token_scores(queries, columns, over_rows="max"))

    def _add(self, inputs: AttentionInputs, state: LoopServeState, scores: Tensor) -> None:
        """Add a layer's scores of columns ``[Hkv, Tk]`` to the current observation."""
        state.layer_scores[inputs.layer.index] = by_position(scores, inputs)
        state.scores.add(self.config, inputs.layer.index, state.layer_scores[inputs.layer.index])

    # After the forward pass: selection for all layers at once.

    def after_forward(self, step: Step, state: LoopServeState) -> Selections | Observation | None:
        if step.phase is Phase.DECODE:
            return self._after_output(step, state)
        if not step.final or (step.phase is Phase.OBSERVE and not state.observing):
            return None
        if step.phase is Phase.PREFILL:
            state.input_end = step.length
        if not state.layer_inputs:
            return None
        state.scores.commit(decay=1.0)  # the hops are combined by their maximum
        if step.phase is Phase.PREFILL and state.first_hop_scores is not None:
            rows = looked_at_most(self.config, state.first_hop_scores, step.turn_start, step.length)
            state.first_hop_scores = None
            state.observing = rows is not None and not self._keeps(rows, step, state)
            if rows is not None and state.observing:
                return Observation(rows)
            if rows is not None:
                self._second_hop(rows, step, state)
        state.observing = False
        return self._select(step, state)

    def _keeps(self, rows: Tensor, step: Step, state: LoopServeState) -> bool:
        """Return whether the queries of all these positions are kept. Those of earlier chunks are not."""
        if self.config.second_hop is SecondHop.AGAIN:
            return False
        return int(rows[0]) >= step.length - min(call.new_tokens for call in state.layer_inputs.values())

    def _second_hop(self, rows: Tensor, step: Step, state: LoopServeState) -> None:
        """Score the kept queries of these positions, as an observation pass would."""
        for call in state.layer_inputs.values():
            chosen = (rows - (step.length - call.new_tokens)).to(call.queries.device)
            self._take(call, state, call.queries[:, chosen], call.columns[chosen])
        state.scores.commit(decay=1.0)

    def _after_output(self, step: Step, state: LoopServeState) -> Selections | None:
        selections = None
        self._move_threshold(step, state)
        if self._due(step, state) and any(self._crowded(call, state) for call in state.layer_inputs.values()):
            for layer, call in state.layer_inputs.items():
                if layer in state.code_scores:
                    found = state.code_scores.pop(layer)
                    state.layer_scores[layer] = pad(found, (0, call.length - found.shape[1]))
                elif layer not in state.layer_scores:  # a layer with drift has been scored already
                    state.layer_scores[layer] = self._score(call, state.output_queries[layer])
                state.scores.add(self.config, layer, state.layer_scores[layer])
            state.scores.commit(self.config.memory)
            step.record.count("reselections")
            selections = self._select(step, state)
        state.layer_inputs = {}
        return selections

    def _due(self, step: Step, state: LoopServeState) -> bool:
        """Return whether it is time for a new selection."""
        config, outputs = self.config, step.output_index - state.selected_at
        if config.trigger is Trigger.INTERVAL or not state.selections:
            return outputs >= config.interval
        return state.drifted or 0 < config.drift_max_interval <= outputs

    def _crowded(self, call: AttentionInputs, state: LoopServeState) -> bool:
        """Return whether a layer holds more pairs before the boundary than are attended in any case."""
        tail = call.length - self._boundary(call, state)
        return call.total_tokens - tail > self.config.budget

    def _boundary(self, inputs: AttentionInputs, state: LoopServeState) -> int:
        return state.input_end if self.config.scope is Scope.INPUTS else inputs.length

    def _score(self, inputs: AttentionInputs, queries: Sequence[Tensor]) -> Tensor:
        """Return scores by position ``[Hkv, length]`` of this turn's last output queries, the current one last."""
        rows = torch.cat(list(queries), dim=1)[:, -(self.config.window or self.config.interval) :]
        # The pairs of consecutive outputs are adjacent at the end, whatever was evicted before them.
        columns = torch.arange(inputs.total_tokens - rows.shape[1], inputs.total_tokens, device=rows.device)
        return by_position(inputs.token_scores(rows, columns, over_rows=self.config.rows.value), inputs)

    def _select(self, step: Step, state: LoopServeState) -> Selections | None:
        """Return the selection of every layer of the pass, and end the observation."""
        selections = {}
        for layer, call in state.layer_inputs.items():
            scores = state.scores.accumulated[unit_of(self.config, layer)]
            selection = choose(self.config, scores, call, self._boundary(call, state))
            if selection is None:
                continue
            step.record.mean("recovered_mass", captured_share(state.layer_scores[layer], selection))
            if layer in state.selections:
                step.record.mean("overlap", overlap(selection, state.selections[layer]))
            state.selections[layer] = selections[layer] = selection
            if self.config.trigger is Trigger.DRIFT:
                probe = self._probe(call, state)
                state.drift_references[layer] = probe.calibrated(probe.with_jumps(selection, self.config.page_budget))
        if self.config.by_threshold and selections and state.controller.log_threshold is None:
            self._begin_threshold(state)
        state.selected_at, state.drifted = step.output_index, False
        state.layer_scores, state.layer_inputs = {}, {}
        if self.retention is Retention.EVICT:
            state.output_queries = {}  # their own pairs, and so their columns, may be evicted
        return selections or None
