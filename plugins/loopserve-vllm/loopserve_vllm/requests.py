"""Keep the policies' state of every request that vLLM's model runner serves, from its first step to its last."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from vllm.logger import init_logger
from vllm.v1.worker.cpu_model_runner import CPUModelRunner

from loopserve.core.engine.forward import ForwardContext
from loopserve.core.engine.hosted import HostedTurn
from loopserve.core.kv.paged import BlockLayer, PagedPairs, Table
from loopserve_vllm.start import Settings

ended: deque[dict[str, Any]] = deque(maxlen=1024)  # figures of requests
_log = init_logger("vllm.loopserve")  # a name under vLLM's own, whose handler it gets


class Request(HostedTurn):
    """One request of vLLM, as a turn whose pairs lie in the blocks of a table."""

    def __init__(self, name: str, settings: Settings, layers: Sequence[BlockLayer], tokens: list[int], stored: int):
        """stored: tokens that the prefix cache had."""
        self.name, self.table = name, Table()
        stores = [PagedPairs(layer, self.table) for layer in layers]
        super().__init__(settings.slots, settings.guard, stores, tokens, stored=stored)

    @property
    def figures(self) -> dict[str, Any]:
        own = {"request": self.name, "decode_steps": self.stats.decode_steps}
        return own | self.stats.as_dict() | dict(self.table.counts)


@dataclass
class Row:
    """One request's part of a batch: its number in it and its tokens. Without a request it is served dense."""

    number: int
    tokens: slice
    request: Request | None = None
    context: ForwardContext | None = None


class Requests:
    """Hold the requests of one model runner."""

    current: ClassVar[Requests | None] = None  # while its runner computes
    last: ClassVar[Requests | None] = None

    def __init__(self, settings: Settings, runner: Any) -> None:
        self.settings, self.runner, Requests.last = settings, runner, self
        self.layers = [BlockLayer() for _ in settings.slots.by_layer]
        self.held: dict[str, Request | None] = {}  # None: dense to its end
        self._rows: list[Row] = []
        self.shared: dict[Any, Any] = {}  # what the layers of one step have in common

    def step(self, scheduled: Any, compute: Callable[[], Any]) -> Any:
        """Run one step of the runner. Requests that have ended, or were preempted, leave their states behind first."""
        resumed = scheduled.scheduled_cached_reqs.resumed_req_ids
        for name in {*scheduled.finished_req_ids, *(scheduled.preempted_req_ids or ()), *resumed}:
            self._drop(name)
        self._rows, self.shared, Requests.current = [], {}, self
        try:
            found = compute()
        finally:
            Requests.current = None
        for row in self._rows:
            if row.request is not None and row.context is not None:
                try:
                    row.request.end_pass(row.context)
                except Exception as error:
                    _log.warning("request %s goes on with dense attention: %s", row.request.name, error)
                    row.request.stats.count("fault:other")
                    self._drop(row.request.name)
                    self.held[row.request.name] = None
        return found

    def rows(self, metadata: Any, block_size: int) -> list[Row]:
        """Return the requests of the step under way, in the order of its batch."""
        if not self._rows:
            starts, lengths = metadata.query_start_loc.tolist(), metadata.seq_lens.tolist()
            for number, name in enumerate(self.runner.input_batch.req_ids):
                row = Row(number, slice(starts[number], starts[number + 1]))
                new = row.tokens.stop - row.tokens.start
                row.request = self._request(name, lengths[number] - new)
                if row.request is not None:
                    blocks = -(-lengths[number] // block_size)
                    row.request.table.blocks = metadata.block_table[number, :blocks].long()
                    row.context = row.request.begin_pass(new)
                self._rows.append(row)
        return self._rows

    def _request(self, name: str, stored: int) -> Request | None:
        held = self.held.get(name)
        if name not in self.held or (held is not None and held.seen != stored):
            self._drop(name)
            given = self.runner.requests[name]
            tokens = [*(given.prompt_token_ids or [0] * given.num_prompt_tokens), *given.output_token_ids]
            self.held[name] = held = Request(name, self.settings, self.layers, tokens, stored)
        return held

    def _drop(self, name: str) -> None:
        if (request := self.held.pop(name, None)) is None:
            return
        figures = request.figures
        ended.append(figures)
        request.close()
        _log.info(
            "request %s under stack %s: %d prompt tokens, %d of them cached; %d outputs; prefill density %s, attended fraction %s, "
            "%d faults",
            *(name, self.settings.name, request.prefill_end, request.stored, figures["output_tokens"]),
            *(figures["prefill_tile_density"], figures["attended_fraction"], figures["faults"]),
        )


def follow(settings: Settings) -> None:
    """Have every model runner of this process tell its steps to a ``Requests`` of its own."""
    execute = getattr(CPUModelRunner.execute_model, "of_vllm", CPUModelRunner.execute_model)

    @functools.wraps(execute)
    def followed(runner: Any, scheduler_output: Any, *args: Any, **options: Any) -> Any:
        if "loopserve" not in vars(runner):
            runner.loopserve = Requests(settings, runner)
        return runner.loopserve.step(scheduler_output, lambda: execute(runner, scheduler_output, *args, **options))

    followed.of_vllm = execute
    CPUModelRunner.execute_model = followed
