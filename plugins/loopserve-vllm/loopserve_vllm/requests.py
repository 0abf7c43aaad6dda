"""Follow vLLM's model runner: a policy state for every request, from its first step to its last."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ClassVar

from prometheus_client import Summary
from vllm.config import get_current_vllm_config
from vllm.logger import init_logger
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from loopserve.core.engine.paged_requests import PagedRequests, summary
from loopserve_vllm.start import Settings, settings

_log = init_logger("vllm.loopserve")  # a name under vLLM's own, whose handler it gets
_NAMES = ("known_tokens", "cached_tokens", "output_tokens", "prefill_tile_density", "attended_fraction", "faults")
_METRICS = {each: Summary(f"loopserve_{each}", f"{each} of a request, by its stack", ["stack"]) for each in _NAMES}


class Requests(PagedRequests):
    """Hold the requests of one model runner."""

    last: ClassVar[Requests | None] = None

    def __init__(self, settings: Settings, runner: Any) -> None:
        super().__init__(settings.slots, settings.guard)
        self._stack, self._runner, Requests.last = settings.stack, runner, self

    def step(self, scheduled: Any, compute: Callable[[], Any]) -> Any:
        """Run one step of the runner. Requests that have ended, or were preempted, leave their states behind first."""
        resumed = scheduled.scheduled_cached_reqs.resumed_req_ids
        for ended in self.drop({*scheduled.finished_req_ids, *(scheduled.preempted_req_ids or ()), *resumed}):
            _log.info("request %s under stack %s: %s", ended["request"], self._stack, summary(ended))
            for name in (each for each in _NAMES if ended[each] is not None):
                _METRICS[name].labels(self._stack).observe(ended[name])
        with self.running():
            return compute()

    def take(self, batch: Any, block_size: int) -> None:
        """Begin the step under way in its first layer. batch: the attention metadata."""
        if not self.rows:
            names, starts, lengths = self._runner.input_batch.req_ids, batch.query_start_loc, batch.seq_lens
            self.begin(names, starts.tolist(), lengths.tolist(), batch.block_table, block_size, self._known)

    def _known(self, name: str) -> list[int]:
        """Return the tokens known of a request. Of a prompt given as embeddings only their number counts."""
        request = self._runner.requests[name]
        return [*(request.prompt_token_ids or [0] * request.num_prompt_tokens), *request.output_token_ids]


def followed() -> bool:
    """Have every model runner of this process tell its steps to a ``Requests`` of its own; return False without a stack."""
    if (found := settings(get_current_vllm_config())) is None:
        return False
    execute = getattr(GPUModelRunner.execute_model, "of_vllm", GPUModelRunner.execute_model)

    @functools.wraps(execute)
    def step(runner: Any, scheduler_output: Any, *args: Any, **options: Any) -> Any:
        if "loopserve" not in vars(runner):
            runner.loopserve = Requests(found, runner)
        return runner.loopserve.step(scheduler_output, lambda: execute(runner, scheduler_output, *args, **options))

    step.of_vllm = execute
    GPUModelRunner.execute_model = step  # that of a CPU is derived from it
    return True
