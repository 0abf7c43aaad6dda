"""Count what the server does, under the names of vLLM with the prefix ``loopserve:``."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from loopserve.serve.answer import Answer, Reply

if TYPE_CHECKING:
    from loopserve.serve.conversations import Conversations

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Metrics:
    """Hold the metrics of one server, in a registry of its own."""

    def __init__(self, conversations: Conversations) -> None:
        self._registry = CollectorRegistry()
        worker, files, store = conversations.worker, conversations.files, conversations.store
        gauges = {
            "num_requests_running": ("Turns under way.", lambda: worker.scheduler.running),
            "num_requests_waiting": ("Turns that wait to begin.", lambda: worker.scheduler.waiting),
            "kv_cache_bytes": ("Bytes of stores, active sets and policy states.", self._kv_bytes(conversations)),
            "kv_cache_usage_perc": ("Share of --kv-cache-memory that is taken.", self._kv_share(conversations)),
            "sessions_in_memory": ("Sessions at rest with their pairs in memory.", lambda: len(conversations.live)),
            "admission_rejections": ("Requests that were answered 503.", lambda: worker.rejected),
            "engine_restarts": ("Times that the engine was restarted after a failure.", lambda: worker.restarts),
            "kv_files_written": ("Files of pairs written.", lambda: files.written),
            "kv_files_restored": ("Conversations restored from files.", lambda: files.restored),
            "kv_files_damaged": ("Files that were damaged, and removed.", lambda: files.damaged),
            "kv_files_failed": ("Files that could not be written.", lambda: files.failed),
            "kv_files_evicted": ("Files removed for a limit on the disk.", lambda: files.evicted),
            "turns_in_memory_only": ("Turns, sessions and responses that the disk refused.", lambda: store.spare_turns),
        }
        for name, (text, value) in gauges.items():
            Gauge(f"loopserve:{name}", text, registry=self._registry).set_function(value)
        self._queries = self._counter("prefix_cache_queries", "Prompt tokens of all requests.")
        self._hits = self._counter("prefix_cache_hits", "Prompt tokens that were not computed again.")
        self._generated = self._counter("generation_tokens", "Output tokens.")
        self._finished = self._counter("request_success", "Answers by the reason of their end.", ["finished_reason"])
        self._faults = self._counter("policy_fallbacks", "Times that a policy was not used where the stack names one.")
        self._ttft = self._histogram("time_to_first_token_seconds", "From the request to its first token.")
        self._itl = self._histogram("inter_token_latency_seconds", "Mean time per output token of an answer.")
        self._e2e = self._histogram("e2e_request_latency_seconds", "From the request to its last token.")

    def began(self, answer: Answer) -> None:
        """Count a request whose first token is there, or that has waited for it for long."""
        self._queries.inc(answer.prompt_tokens)
        self._hits.inc(answer.cached_tokens)
        self._ttft.observe(time.time() - answer.created)

    def ended(self, answer: Answer, replies: Sequence[Reply]) -> None:
        """Count complete answers."""
        self._e2e.observe(time.time() - answer.created)
        for reply in replies:
            self._generated.inc(len(reply.tokens))
            self._finished.labels(str(reply.finish_reason)).inc()
            self._faults.inc(reply.stats.as_dict()["fallbacks"])
            if reply.stats.tpot_ms is not None:
                self._itl.observe(reply.stats.tpot_ms / 1e3)

    def text(self) -> bytes:
        """Return the metrics in Prometheus' format."""
        return generate_latest(self._registry)

    def _counter(self, name: str, text: str, labels: Sequence[str] = ()) -> Counter:
        return Counter(f"loopserve:{name}", text, labels, registry=self._registry)

    def _histogram(self, name: str, text: str) -> Histogram:
        return Histogram(f"loopserve:{name}", text, buckets=_SECONDS, registry=self._registry)

    @staticmethod
    def _kv_bytes(conversations: Conversations):  # type: ignore[no-untyped-def]
        return lambda: conversations.live.allocated_bytes

    @staticmethod
    def _kv_share(conversations: Conversations):  # type: ignore[no-untyped-def]
        limit = conversations.settings.kv_cache_memory
        return lambda: conversations.live.allocated_bytes / limit if limit else 0.0
