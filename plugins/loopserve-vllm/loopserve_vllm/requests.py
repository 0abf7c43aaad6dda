"""Follow vLLM's model runner: a policy state for every request, from its first step to its last."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

from vllm.logger import init_logger
from vllm.v1.worker.cpu_model_runner import CPUModelRunner

from loopserve.core.engine.forward import ForwardContext
from loopserve.core.engine.paged_requests import PagedRequests, PagedTurn
from loopserve_vllm.start import Settings

_log = init_logger("vllm.loopserve")  # a name under vLLM's own, whose handler it gets
_ENDED = "request %s under stack %s: %d tokens, %d of them cached; %d outputs; prefill density %s, attended fraction %s, %d faults"
_SAID = ("known_tokens", "cached_tokens", "output_tokens", "prefill_tile_density", "attended_fraction", "faults")


class Row(NamedTuple):
    """One request's part of a batch: its number in it and its tokens. Without a turn it is served dense."""

    number: int
    tokens: slice
    length: int
    turn: PagedTurn | None
    context: ForwardContext | None


class Requests(PagedRequests):
    """Hold the requests of one model runner."""

    current: ClassVar[Requests | None] = None  # while its runner computes
    last: ClassVar[Requests | None] = None

    def __init__(self, settings: Settings, runner: Any) -> None:
        super().__init__(settings.slots, settings.guard)
        self._stack, self._runner, Requests.last = settings.stack, runner, self
        self._rows: list[Row] = []
        self.shared: dict[Any, Any] = {}  # what the layers of one step have in common

    def step(self, scheduled: Any, compute: Callable[[], Any]) -> Any:
        """Run one step of the runner. Requests that have ended, or were preempted, leave their states behind first."""
        resumed = scheduled.scheduled_cached_reqs.resumed_req_ids
        for ended in self.drop({*scheduled.finished_req_ids, *(scheduled.preempted_req_ids or ()), *resumed}):
            _log.info(_ENDED, ended["request"], self._stack, *(ended[each] for each in _SAID))
        self._rows, self.shared, Requests.current = [], {}, self
        try:
            found = compute()
        finally:
            Requests.current = None
        for row in self._rows:
            if row.turn is not None and row.context is not None:
                self.end_pass(row.turn, row.context)
        return found

    def rows(self, batch: Any, block_size: int) -> list[Row]:
        """Return the requests of the step under way, in the order of its batch. batch: the attention metadata."""
        if not self._rows:
            starts, lengths = batch.query_start_loc.tolist(), batch.seq_lens.tolist()
            for number, name in enumerate(self._runner.input_batch.req_ids):
                new = starts[number + 1] - starts[number]
                turn = self.turn(name, lengths[number] - new, functools.partial(_known, self._runner.requests[name]))
                if turn is not None:
                    turn.table.blocks = batch.block_table[number, : -(-lengths[number] // block_size)].long()
                tokens = slice(starts[number], starts[number + 1])
                self._rows.append(Row(number, tokens, new, turn, turn and turn.begin_pass(new)))
        return self._rows


def _known(request: Any) -> list[int]:
    """Return the tokens known of a request. Of a prompt given as embeddings only their number counts."""
    return [*(request.prompt_token_ids or [0] * request.num_prompt_tokens), *request.output_token_ids]


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
