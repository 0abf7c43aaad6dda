"""Keep the policies' state of every request that vLLM's model runner serves, from its first step to its last."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from vllm.logger import init_logger
from vllm.v1.worker.cpu_model_runner import CPUModelRunner

from loopserve.core.engine.forward import ForwardContext
from loopserve.core.engine.hosted import HostedTurn
from loopserve.core.kv.paged import BlockLayer, PagedPairs, Table
from loopserve_vllm.start import Settings

ended: deque[dict[str, Any]] = deque(maxlen=1024)
_log = init_logger("vllm.loopserve")  # under vLLM's own, whose handler it uses


@dataclass
class Row:
    """One request of the batch under way, and its tokens in it. context: None where it is served dense."""

    number: int
    start: int
    end: int
    context: ForwardContext | None


class Requests:
    """Hold the turns of one model runner."""

    current: ClassVar[Requests | None] = None  # while its runner computes
    last: ClassVar[Requests | None] = None

    def __init__(self, settings: Settings, runner: Any) -> None:
        self.settings, self.runner, Requests.last = settings, runner, self
        self.layers = [BlockLayer() for _ in settings.slots.by_layer]
        self._turns: dict[str, tuple[HostedTurn | None, Table]] = {}  # no turn: dense to its end
        self._rows: list[Row] | None = None
        self._shared: dict[Any, Any] = {}

    def shared(self, key: Any, make: Callable[[], Any]) -> Any:
        """Return what ``make`` made first in this step; all layers share it."""
        if key not in self._shared:
            self._shared[key] = make()
        return self._shared[key]

    def step(self, scheduled: Any, compute: Callable[[], Any]) -> Any:
        """Run one step of the runner. Requests that have ended, or were preempted, leave their states behind first."""
        for name in {*scheduled.finished_req_ids, *(scheduled.preempted_req_ids or ())}:
            self._drop(name)
        for name in scheduled.scheduled_cached_reqs.resumed_req_ids:
            self._drop(name)
        self._rows, self._shared, Requests.current = None, {}, self
        try:
            found = compute()
        finally:
            Requests.current = None
        for row, name in zip(self._rows or (), self.runner.input_batch.req_ids, strict=False):
            turn, table = self._turns[name]
            if turn is None or row.context is None:
                continue
            try:
                turn.end_pass(row.context)
            except Exception as error:
                _log.warning("request %s goes on with dense attention: %s", name, error)
                self._turns[name] = (None, table)
        return found

    def rows(self, metadata: Any, block_size: int) -> list[Row]:
        """Return the requests of the step under way, in the order of its batch."""
        if self._rows is None:
            starts, lengths = metadata.query_start_loc.tolist(), metadata.seq_lens.tolist()
            self._rows = []
            for number, name in enumerate(self.runner.input_batch.req_ids):
                new = starts[number + 1] - starts[number]
                turn, table = self._turn(name, lengths[number] - new)
                table.blocks = metadata.block_table[number, : -(-lengths[number] // block_size)].long()
                self._rows.append(Row(number, starts[number], starts[number] + new, turn and turn.begin_pass(new)))
        return self._rows

    def _turn(self, name: str, stored: int) -> tuple[HostedTurn | None, Table]:
        """Return a request's turn. A new one begins behind what the prefix cache had of it."""
        held = self._turns.get(name)
        if held is None or (held[0] is not None and held[0].seen != stored):
            self._drop(name)
            request, table = self.runner.requests[name], Table()
            tokens = [*(request.prompt_token_ids or [0] * request.num_prompt_tokens), *request.output_token_ids]
            stores = [PagedPairs(layer, table) for layer in self.layers]
            self._turns[name] = held = (
                HostedTurn(self.settings.slots, self.settings.guard, stores, tokens, stored=stored),
                table,
            )
        return held

    @property
    def figures(self) -> list[dict[str, Any]]:
        """Return the figures of the requests that are held."""
        held = self._turns.items()
        return [{"request": name, **turn.stats.as_dict(), **table.counts} for name, (turn, table) in held if turn]

    def _drop(self, name: str) -> None:
        found = next((each for each in self.figures if each["request"] == name), None)
        turn, _ = self._turns.pop(name, (None, None))
        if turn is None or found is None:
            return
        turn.close()
        ended.append(found)
        _log.info(
            "request %s under stack %s: %d prompt tokens (%d cached), %d decode steps, prefill density %s, attended fraction "
            "%s, %d faults",
            *(name, self.settings.name, found["prompt_tokens"], found["reused_tokens"], turn.stats.decode_steps),
            *(found["prefill_tile_density"], found["attended_fraction"], found["faults"]),
        )


def follow(settings: Settings) -> None:
    """Have every model runner of this process tell its steps to a ``Requests`` of its own."""
    execute = CPUModelRunner.execute_model
    while hasattr(execute, "of_loopserve"):
        execute = execute.of_loopserve

    @torch.inference_mode()
    @functools.wraps(execute)
    def followed(runner: Any, scheduler_output: Any, *args: Any, **options: Any) -> Any:
        if "loopserve" not in vars(runner):
            runner.loopserve = Requests(settings, runner)
        return runner.loopserve.step(scheduler_output, lambda: execute(runner, scheduler_output, *args, **options))

    followed.of_loopserve = execute
    CPUModelRunner.execute_model = followed
