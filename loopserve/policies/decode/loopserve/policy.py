"""LoopServe, phase two: progressive KV compression."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from loopserve.core.kv.key_summaries import KeySummaries
from loopserve.core.policy.interfaces import (
    AttentionInputs,
    Capabilities,
    DecodeCompressor,
    KVSelection,
    Observation,
    Phase,
    Retention,
    Selections,
    Step,
)
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
    Memory,
    by_position,
    captured_share,
    choose,
    looked_at_most,
    overlap,
    unit_of,
)
from loopserve.policies.decode.loopserve.probe import Drift, QueryProbe, same, selection_of
from loopserve.policies.draws import generator, uniform_rows


@dataclass
class LoopServeState:
    """What one turn's observations left behind. All but the page summaries is begun anew with each turn."""

    input_end: int = 0  # length when this turn's input had been taken in
    since: int = 0  # outputs processed since the last selection
    awaiting: bool = False  # an observation pass was asked for
    drifted: bool = False  # some layer noticed drift in the pass under way
    memory: Memory = field(default_factory=Memory)
    row_importance: Tensor | None = None  # [length], how much the last rows look at each token
    observed: dict[int, Tensor] = field(default_factory=dict)  # a layer's latest scores by position, until selection
    chosen: dict[int, KVSelection] = field(default_factory=dict)
    drift: dict[int, Drift] = field(default_factory=dict)
    queries: dict[int, deque[Tensor]] = field(default_factory=dict)  # this turn's last outputs, [Hq, 1, D] each
    calls: dict[int, AttentionInputs] = field(default_factory=dict)  # layers of the pass under way, views of the store
    pages: dict[int, KeySummaries] = field(default_factory=dict)
    code_scores: dict[int, Tensor] = field(
        default_factory=dict
    )  # rescore by codes: [Hkv, boundary], summed since the selection


def _over_group(scores: Tensor, inputs: AttentionInputs) -> Tensor:
    """The mean over each group of query heads: ``[Hq, Tk]`` to ``[Hkv, Tk]``."""
    return scores.view(-1, inputs.group, inputs.total_tokens).mean(1)


class LoopServeDecode(DecodeCompressor[LoopServeState]):
    """Every few outputs, scores the last output queries against the full store and attends to the best pairs.

    Paper: LoopServe, https://arxiv.org/abs/2507.13681, progressive KV compression: every n_d outputs the last n_d
    output queries are scored over all keys, the group's mean ranks the pairs, and each KV head attends to the best B
    of them and to this turn's outputs.

    Variant and deviations: the paper's code is not public; what starts an answer (``first_block``) and how many queries
    score are readings. Own additions, each a field with a value that turns it off: two-hop first observation (the last
    rows say which rows of the turn they look at, an extra pass over those says which keys matter), a decaying maximum
    over observations (``memory``), one selection for several heads or layers (``share``), pooling, sinks and recent
    window, outputs that compete for the budget (``scope: all``), re-selection on drift, and a part of the budget that
    each step gives to what its own query points to: pages by Quest's bounds (``page_budget``, https://arxiv.org/abs/2406.10774),
    or single tokens by codes of the keys (``key_bits``), which can serve re-selection as well (``rescore``); short conversations
    decoded dense (``dense_below``). The preset ``loopserve-paper`` turns them off, ``loopserve`` uses what evidence supports.

    Drift is estimated by ``loopserve_step.QueryProbe.captured``: by the keys' codes, or by page bounds calibrated at each
    selection. A layer that finds it re-selects by itself within the step, all layers together after it.

    Multi-turn: a new turn's prefill sees the whole store (``pool: full``), and its answer's first selection starts from
    scratch over history and new turn; what was passed over before can return at any time. With ``pool: active``
    unselected pairs are evicted: later turns see survivors only.
    """

    name: ClassVar[str] = "loopserve"
    paper: ClassVar[str] = "https://arxiv.org/abs/2507.13681"
    capabilities: ClassVar[Capabilities] = Capabilities(retentions=frozenset(Retention))

    class Config(LoopServeDecodeConfig):
        """See ``loopserve_config``."""

    config: LoopServeDecodeConfig

    @property
    def retention(self) -> Retention:
        return Retention.EVICT if self.config.pool is Pool.ACTIVE else Retention.KEEP

    @property
    def counts_outputs(self) -> bool:
        return self.config.scope is Scope.ALL

    @property
    def dense_below_tokens(self) -> int:
        # An eviction makes the store short, not the conversation: what is left of it still has to be watched.
        return self.config.dense_tokens if self.retention is Retention.KEEP else 0

    def init_state(self) -> LoopServeState:
        return LoopServeState()

    def end_turn(self, state: LoopServeState) -> None:
        state.__dict__.update(LoopServeState(pages=state.pages).__dict__)

    def held_bytes(self, state: LoopServeState) -> int:
        return sum(pages.nbytes for pages in state.pages.values() if pages.columns)

    # Before a layer's attention: what only the current query can tell.

    def before_attention(self, inputs: AttentionInputs, state: LoopServeState) -> KVSelection | None:
        """Bring in what the current query points to; re-select if the selection has lost that query."""
        config, layer = self.config, inputs.layer.index
        base = state.chosen.get(layer)
        if base is None or not self._looks_within_the_step():
            return None
        if config.key_bits and config.trigger is Trigger.INTERVAL:
            return self._jump(inputs, base, state)
        probe = self._probe(inputs, state)
        columns = probe.with_jumps(base, config.page_budget)
        if layer in state.drift and state.since + 1 >= config.drift_min_interval:
            estimate = probe.captured(columns, state.drift[layer])
            inputs.record.mean("drift_captured", estimate)
            if state.drift[layer].found(estimate, config.drift_threshold):
                base = self._select_within_step(inputs, state) or base
                columns = probe.with_jumps(base, config.page_budget)
                state.drift[layer] = probe.calibrated(columns)
        selection = selection_of(columns, inputs, base)
        return None if same(inputs.selection, selection) else selection

    def _jump(self, inputs: AttentionInputs, base: KVSelection, state: LoopServeState) -> KVSelection:
        """The base and what the current query points to by the keys' codes, attended in place.

        Nothing is evicted under ``page_budget``, so positions are columns and no head holds filler.
        """
        pages = self._probe(inputs, state).pages
        observed = None
        if self.config.rescore is Rescore.CODES:
            told = state.code_scores.get(inputs.layer.index)
            if told is None or told.shape[1] != base.boundary:
                told = torch.zeros(base.indices.shape[0], base.boundary, dtype=torch.float32, device=inputs.keys.device)
                state.code_scores[inputs.layer.index] = told
            observed = told
        budget = min(self.config.page_budget, base.boundary - base.indices.shape[1])
        columns = pages.jumps(inputs.queries[:, -1:], base.indices, base.boundary, budget, inputs.scaling, observed)
        return KVSelection.uniform(columns, base.boundary, fleeting=True)

    def _looks_within_the_step(self) -> bool:
        return bool(self.config.page_budget) or self.config.trigger is Trigger.DRIFT

    def _pages(self, inputs: AttentionInputs, state: LoopServeState) -> KeySummaries:
        """The layer's summaries, brought up to date."""
        pages = state.pages.setdefault(inputs.layer.index, KeySummaries(self.config.page, self.config.key_bits))
        pages.update(inputs.keys)
        return pages

    def _probe(self, inputs: AttentionInputs, state: LoopServeState) -> QueryProbe:
        return QueryProbe.at(inputs, self._pages(inputs, state))

    def _select_within_step(self, inputs: AttentionInputs, state: LoopServeState) -> KVSelection | None:
        """A selection for this layer alone, by the current query and those before it; the others follow after the pass."""
        layer = inputs.layer.index
        state.drifted = True
        inputs.record.count("drift")
        state.observed[layer] = self._score(inputs, [*state.queries.get(layer, ()), inputs.queries])
        scores = state.memory.with_one(self.config, layer, state.observed[layer])
        base = choose(self.config, scores, inputs, self._boundary(inputs, state))
        if base is not None:
            state.chosen[layer] = base
        return base

    # After a layer's attention: observing.

    def after_attention(self, inputs: AttentionInputs, state: LoopServeState) -> None:
        layer = inputs.layer.index
        if inputs.phase is Phase.PREFILL:
            if self._looks_within_the_step() and inputs.total_tokens > self.config.dense_tokens:
                self._pages(inputs, state)  # with the prefill, so that the first output need not wait for it
            if inputs.final:
                self._observe_prefill(inputs, state)
        elif inputs.phase is Phase.DECODE:
            if inputs.total_tokens <= self.config.dense_tokens:
                return  # nothing to leave out yet, and no work for it
            kept = state.queries.setdefault(layer, deque(maxlen=self.config.window or self.config.interval))
            kept.append(inputs.queries.detach())
            state.calls[layer] = inputs
        elif state.awaiting and layer in state.calls:
            self._take(inputs, state, inputs.queries, inputs.columns)

    def _observe_prefill(self, inputs: AttentionInputs, state: LoopServeState) -> None:
        """The first observation; in a layer that has nothing to leave out, none."""
        config = self.config
        if config.first_block is FirstBlock.DENSE or inputs.total_tokens <= config.dense_tokens:
            return
        call = replace(inputs, scratch={})
        if config.first_block is not FirstBlock.TWO_HOP or config.second_hop is SecondHop.AGAIN:
            # The last query stays for drift; all queries of a long turn would take more memory than its keys.
            call = replace(call, queries=inputs.queries[:, -1:].detach().clone(), columns=inputs.columns[-1:])
        state.calls[inputs.layer.index] = call
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
        # One reading of the keys gives both: what the rows look at most, and which rows of the turn they look at.
        scores = inputs.token_scores(inputs.queries[:, last], inputs.columns[last], over_rows="max")
        self._add(inputs, state, scores)
        looked_at = by_position(scores, inputs).sum(0)
        state.row_importance = looked_at if state.row_importance is None else state.row_importance + looked_at

    def _take(self, inputs: AttentionInputs, state: LoopServeState, queries: Tensor, columns: Tensor) -> None:
        """Take what some rows of the turn attend to into the observation under way: the maximum over the rows."""
        self._add(inputs, state, inputs.token_scores(queries, columns, over_rows="max"))

    def _add(self, inputs: AttentionInputs, state: LoopServeState, scores: Tensor) -> None:
        """Take a layer's scores of columns ``[Hkv, Tk]`` into the observation under way."""
        state.observed[inputs.layer.index] = by_position(scores, inputs)
        state.memory.add(self.config, inputs.layer.index, state.observed[inputs.layer.index])

    # After the forward pass: selecting, for all layers at once.

    def after_forward(self, step: Step, state: LoopServeState) -> Selections | Observation | None:
        if step.phase is Phase.DECODE:
            return self._after_output(step, state)
        if not step.final or (step.phase is Phase.OBSERVE and not state.awaiting):
            return None
        if step.phase is Phase.PREFILL:
            state.input_end = step.length
        if not state.calls:
            return None
        state.memory.commit(decay=1.0)  # the hops are joined by their maximum
        if step.phase is Phase.PREFILL and state.row_importance is not None:
            rows = looked_at_most(self.config, state.row_importance, step.turn_start, step.length)
            state.row_importance = None
            state.awaiting = rows is not None and not self._keeps(rows, step, state)
            if rows is not None and state.awaiting:
                return Observation(rows)
            if rows is not None:
                self._second_hop(rows, step, state)
        state.awaiting = False
        return self._select(step, state)

    def _keeps(self, rows: Tensor, step: Step, state: LoopServeState) -> bool:
        """Whether the queries of all these positions are at hand; those of earlier chunks are not."""
        if self.config.second_hop is SecondHop.AGAIN:
            return False
        return int(rows[0]) >= step.length - min(call.new_tokens for call in state.calls.values())

    def _second_hop(self, rows: Tensor, step: Step, state: LoopServeState) -> None:
        """Score the kept queries of these positions, as an observation pass would."""
        for call in state.calls.values():
            chosen = (rows - (step.length - call.new_tokens)).to(call.queries.device)
            self._take(call, state, call.queries[:, chosen], call.columns[chosen])
        state.memory.commit(decay=1.0)

    def _after_output(self, step: Step, state: LoopServeState) -> Selections | None:
        state.since += 1
        selections = None
        if self._due(state) and any(self._crowded(call, state) for call in state.calls.values()):
            for layer, call in state.calls.items():
                if layer in state.code_scores:
                    told = state.code_scores.pop(layer)
                    state.observed[layer] = pad(told, (0, call.length - told.shape[1]))
                elif layer not in state.observed:  # a layer that drifted has scored already
                    state.observed[layer] = self._score(call, state.queries[layer])
                state.memory.add(self.config, layer, state.observed[layer])
            state.memory.commit(self.config.memory)
            step.record.count("reselections")
            selections = self._select(step, state)
        state.calls = {}
        return selections

    def _due(self, state: LoopServeState) -> bool:
        config = self.config
        if config.trigger is Trigger.INTERVAL or not state.chosen:
            return state.since >= config.interval
        return state.drifted or 0 < config.drift_max_interval <= state.since

    def _crowded(self, call: AttentionInputs, state: LoopServeState) -> bool:
        """Whether a layer holds more pairs before the boundary than are attended anyway."""
        tail = call.length - self._boundary(call, state)
        return call.total_tokens - tail > self.config.dense_tokens

    def _boundary(self, inputs: AttentionInputs, state: LoopServeState) -> int:
        return state.input_end if self.config.scope is Scope.INPUTS else inputs.length

    def _score(self, inputs: AttentionInputs, queries: Sequence[Tensor]) -> Tensor:
        """Scores by position ``[Hkv, length]`` of this turn's last output queries, the current one last."""
        rows = torch.cat(list(queries), dim=1)[:, -(self.config.window or self.config.interval) :]
        # The pairs of consecutive outputs stand side by side at the end, whatever was evicted before them.
        columns = torch.arange(inputs.total_tokens - rows.shape[1], inputs.total_tokens, device=rows.device)
        return by_position(inputs.token_scores(rows, columns, over_rows=self.config.rows.value), inputs)

    def _select(self, step: Step, state: LoopServeState) -> Selections | None:
        """Choose for every layer of the pass, and end the observation."""
        selections = {}
        for layer, call in state.calls.items():
            scores = state.memory.held[unit_of(self.config, layer)]
            selection = choose(self.config, scores, call, self._boundary(call, state))
            if selection is None:
                continue
            step.record.mean("recovered_mass", captured_share(state.observed[layer], selection))
            if layer in state.chosen:
                step.record.mean("overlap", overlap(selection, state.chosen[layer]))
            state.chosen[layer] = selections[layer] = selection
            if self.config.trigger is Trigger.DRIFT:
                probe = self._probe(call, state)
                state.drift[layer] = probe.calibrated(probe.with_jumps(selection, self.config.page_budget))
        state.since, state.drifted = 0, False
        state.observed, state.calls = {}, {}
        if self.retention is Retention.EVICT:
            state.queries = {}  # their own pairs may be gone, and with them their columns
        return selections or None
