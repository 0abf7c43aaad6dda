"""Options under which each policy acts on conversations of a few dozen tokens, the built-in registry, and policies of both."""

from __future__ import annotations

from typing import Any

from loopserve.core.kv.selection import Retention
from loopserve.core.policy.registry import Kind, Registration, Registry
from loopserve.core.stack.stack import resolve_stack
from loopserve.policies import loopserve_register_policies

SNAP = {"policy": "snapkv", "budget": 24, "window": 8}
SMALL: dict[str, dict[str, Any]] = {
    "prefill loopserve": {
        "alpha": 0.7,
        "sample_rows": 16,
        "local_window": 4,
        "min_new_tokens": 1,
        "min_total_tokens": 1,
        "dense_above": 1.0,
    },
    "prefill a_shape": {"sink_tokens": 3, "local_window": 8},
    "prefill tri_shape": {"sink_tokens": 3, "local_window": 8, "last_rows": 5},
    "prefill minference": {"vertical_size": 6, "slash_size": 10, "sink_tokens": 2, "local_window": 4},
    "prefill flashprefill": {
        "threshold": 0.5,
        "block": 8,
        "sink_tokens": 8,
        "local_window": 8,
        "last_rows": 5,
    },
    "prefill duo": {"sink_tokens": 2, "recent_window": 8, "calibration_tokens": 30},
    "prefill flexprefill": {"gamma": 0.6, "block": 8, "min_budget": 4},
    "prefill xattention": {"threshold": 0.5, "stride": 4, "block": 8},
    "prefill topk_blocks": {"top_p": 0.5, "block": 8},
    "prefill sample_attention": {"alpha": 0.6, "sample_share": 0.2, "local_share": 0.1, "sink_tokens": 2},
    "prefill static_lines": {"alpha": 0.7, "sample_rows": 16, "sink_tokens": 2, "local_window": 4},
    "decode loopserve": {"budget": 24, "interval": 3, "recent_window": 4},
    "decode snapkv": {"budget": 24, "window": 8},
    "decode random": {"budget": 24, "recent_window": 4},
    "decode streaming_llm": {"budget": 24},
    "decode tova": {"budget": 24},
    "decode h2o": {"budget": 24},
    "decode knorm": {"budget": 24, "recent_window": 4},
    "decode keydiff": {"budget": 24, "recent_window": 4},
    "decode lagkv": {"budget": 24, "recent_window": 4, "lag": 8},
    "decode expected_attention": {"budget": 24, "recent_window": 4, "future": 16},
    "decode adakv": {"inner": SNAP},
    "decode pyramidkv": {"inner": SNAP, "beta": 4},
    "decode criticalkv": {"inner": SNAP},
    "decode chunkkv": {"inner": SNAP, "chunk": 5},
    "decode flowkv": {"inner": SNAP},
    "decode twilight": {"inner": SNAP, "top_p": 0.7},
    "decode kvzip": {"budget": 24, "recent_window": 4, "chunk": 16},
    "decode omnikv": {"budget": 24},
    "decode rkv": {"budget": 24, "window": 4, "interval": 5},
    "decode duo": {"sink_tokens": 4, "recent_window": 12, "calibration_tokens": 30, "interval": 3},
    "decode quest": {"budget": 24, "page": 4},
    "decode rocketkv_mt": {"budget": 16, "filter_budget": 24, "window": 8, "kernel": 3, "page": 4},
    "decode recover_alpha": {"alpha": 0.7, "least": 6, "interval": 3, "recent_window": 4, "window": 8},
}


def registered() -> Registry:
    registry = Registry()
    loopserve_register_policies(registry)
    return registry


POLICIES = list(registered())
SPARSIFIERS = [each for each in POLICIES if each.kind is Kind.PREFILL]
COMPRESSORS = [each for each in POLICIES if each.kind is Kind.DECODE]


def label(policy: Registration) -> str:
    return f"{policy.kind} {policy.name}"


def wraps(policy: Registration) -> bool:
    return "inner" in policy.config.model_fields


def spec(policy: Registration, retention: Retention = Retention.KEEP) -> dict[str, Any]:
    """What a stack file says of a policy under small options."""
    written = {"policy": policy.name, **SMALL.get(label(policy), {})}
    if retention is Retention.EVICT:
        if wraps(policy):
            written["inner"] = {**written["inner"], "retention": "evict"}
        else:
            written |= {"pool": "active"} if policy.name == "loopserve" else {"retention": "evict"}
    return written


def built(kind: Kind, written: dict[str, Any]) -> Any:
    """The policy that a stack file's entry makes."""
    neutral = {"prefill": {"policy": "dense"}, "decode": {"policy": "full"}}
    stack = resolve_stack({**neutral, kind.value: written}, registered())
    return stack.prefill if kind is Kind.PREFILL else stack.decode


def small(policy: Registration, **more: Any) -> Any:
    return built(policy.kind, spec(policy) | more)


def default(policy: Registration) -> Any:
    """A policy as it comes; a wrapper around ``snapkv``."""
    return built(policy.kind, {"policy": policy.name} | ({"inner": {"policy": "snapkv"}} if wraps(policy) else {}))
