"""Stacks for the experiments: presets with budgets and sizes that fit short conversations, as a stack file says them."""

from __future__ import annotations

import copy
from typing import Any

from loopserve.bench.budget import innermost
from loopserve.core.stack.config import parse_yaml
from loopserve.core.stack.stack import preset_file

Policy = dict[str, Any]
Recipe = dict[str, Any]

FULL: Policy = {"policy": "full"}
DENSE: Policy = {"policy": "dense"}


def preset(name: str) -> Recipe:
    """The policies of a preset with the options its file names."""
    data: Recipe = parse_yaml(preset_file(name).read_text("utf-8"), name).data
    return copy.deepcopy({part: data[part] for part in ("prefill", "decode", "layers") if part in data})


def short_prefill(name: str) -> Policy:
    """A preset's prefill without its lower limit on the length of a conversation: the bundled model's are short."""
    prefill: Policy = preset(name)["prefill"]
    prefill.pop("min_total_tokens", None)
    return prefill


def lines_by_alpha() -> Policy:
    """Return the prefill by lines that a share alpha of the mass alone chooses, which the preset had until it got a least weight."""
    return {
        "policy": "loopserve",
        "alpha": 0.98,
        "sample_rows": 64,
        "sampling": "mixed",
        "cost": "tile",
        "sink_tokens": 4,
        "local_window": 64,
    }


def average_context(tokens: int, turns: int) -> float:
    """Length of the conversation at an answer, on average over equally long turns."""
    return tokens * (turns + 1) / (2 * turns)


def decode_preset(name: str, budget: int, **changes: Any) -> Policy:
    """A preset's decode policy with this budget per KV head; what it sets aside of its budget stays the same share."""
    decode: Policy = preset(name)["decode"]
    inner = innermost(decode)
    if "page_budget" in inner:
        forced = inner.get("sink_tokens", 0) + inner.get("recent_window", 0)
        inner["page_budget"] = min(budget * inner["page_budget"] // inner["budget"], budget - forced - 1)
    if "budget" in inner:
        inner["budget"] = budget
    inner |= changes
    return decode


TWO_HOP: Policy = {"first_block": "two_hop", "second_hop": "kept", "hop_rows": 16}

_OBSERVING = {
    "scope": "inputs",
    "page_budget": 0,
    "page_budget_rule": "top_k",
    "key_bits": 0,
    "rescore": "keys",
    "page": 16,
    "dense_below": 1,
    **TWO_HOP,
}
"""What makes the preset's decoding observe the past only, as well as that can."""


def observing(budget: int, interval: int, **changes: Any) -> Policy:
    """The preset's memory and sharing, and two hops, without a look by the current query."""
    return decode_preset("loopserve", budget, **(_OBSERVING | {"interval": interval} | changes))


def decode_policies(share: float, context: float, outputs: float) -> dict[str, Policy]:
    """Every decode policy at one share of the context.

    context: length of the conversation at an answer, on average. outputs: this turn's outputs attended besides, on average;
    policies that count outputs in get them in their budget.
    """
    whole = round(share * context)
    budget = max(round(share * context - outputs), 48)
    alpha = {0.05: 0.9, 0.1: 0.95, 0.15: 0.98, 0.2: 0.99}.get(share, 0.95)
    return {
        "loopserve": decode_preset("loopserve", max(whole, 48), dense_below=1),
        "loopserve, two hops": decode_preset("loopserve", max(whole, 48), dense_below=1, **TWO_HOP),
        "observing, every 2": observing(budget, 2),
        "observing, every 4": observing(budget, 4),
        "loopserve-paper": decode_preset("loopserve-paper", budget),
        "loopserve-paper, every 4": decode_preset("loopserve-paper", budget, interval=4),
        "quest, pages of 4": {"policy": "quest", "budget": whole, "page": 4},
        "quest, pages of 8": {"policy": "quest", "budget": whole, "page": 8},
        "quest, pages of 16": {"policy": "quest", "budget": whole, "page": 16},
        "rocketkv_mt": {"policy": "rocketkv_mt", "budget": budget, "filter_budget": 4 * budget, "page": 16},
        "rocketkv_mt, pages of 4": {"policy": "rocketkv_mt", "budget": budget, "filter_budget": 4 * budget, "page": 4},
        "snapkv": decode_preset("snapkv", budget),
        "adakv": decode_preset("adakv", budget),
        "pyramidkv": decode_preset("pyramidkv", budget),
        "chunkkv": decode_preset("chunkkv", budget),
        "criticalkv": decode_preset("criticalkv", budget),
        "expected_attention": decode_preset("expected_attention", budget),
        "h2o": decode_preset("h2o", whole),
        "tova": decode_preset("tova", whole),
        "recover_alpha": {"policy": "recover_alpha", "alpha": alpha, "interval": 16},
        "knorm": decode_preset("knorm", budget),
        "keydiff": decode_preset("keydiff", budget),
        "lagkv": decode_preset("lagkv", budget, lag=64),
        "streaming_llm": decode_preset("streaming_llm", whole),
        "random": decode_preset("random", budget),
    }


def prefill_policies(tokens: int) -> dict[str, dict[str, Policy]]:
    """By family and setting, every prefill policy at sizes that fit conversations of about ``tokens`` tokens."""
    ours = lines_by_alpha()
    scale = tokens / 2000
    sizes = [(50, 0), (100, 0), (200, 0), (100, 32), (200, 64), (400, 128)]  # slashes beside the 64 nearest
    windows = [64, 128, 256, 512]
    alphas = [0.8, 0.9, 0.95, 0.98, 0.99]
    few = [0.9, 0.95, 0.98, 0.99]
    return {
        "loopserve": {f"alpha {a}": ours | {"alpha": a} for a in alphas},
        "random rows": {f"alpha {a}": ours | {"alpha": a, "sampling": "uniform"} for a in few},
        "stratified rows": {f"alpha {a}": ours | {"alpha": a, "sampling": "stratified"} for a in few},
        "last rows": {f"alpha {a}": ours | {"alpha": a, "sampling": "last"} for a in few},
        "cost by length": {f"alpha {a}": ours | {"alpha": a, "cost": "length"} for a in few},
        "overlap not counted": {
            f"alpha {a}": ours | {"alpha": a, "cost": "length", "overlap": False} for a in (0.95, 0.98, 0.99)
        },
        "floor per row": {f"alpha 0.9, floor {f}": ours | {"alpha": 0.9, "row_floor": f} for f in (0.8, 0.9)},
        "far rows weigh more": {f"alpha {a}": ours | {"alpha": a, "row_weights": "far"} for a in (0.9, 0.95)},
        "loopserve-paper": {f"alpha {a}": preset("loopserve-paper")["prefill"] | {"alpha": a} for a in few},
        "static lines": {
            f"alpha {a}": {"policy": "static_lines", "alpha": a, "sample_rows": 128} for a in (0.95, 0.98, 0.99)
        },
        "minference": {
            f"{v} + {s} lines": {
                "policy": "minference",
                "vertical_size": max(round(v * scale), 4),
                "slash_size": 64 + round(s * scale),
                "sink_tokens": 4,
                "local_window": 64,
            }
            for v, s in sizes
        },
        "flexprefill": {
            f"gamma {g}": {"policy": "flexprefill", "gamma": g, "tau": 0.1, "block": 64, "min_budget": 64}
            for g in (0.8, 0.9, 0.95)
        },
        "xattention": {
            f"threshold {t}": {"policy": "xattention", "threshold": t, "stride": 8, "block": 64}
            for t in (0.8, 0.9, 0.95, 0.98)
        },
        "topk_blocks": {f"top_p {p}": {"policy": "topk_blocks", "top_p": p, "block": 64} for p in (0.9, 0.95, 0.98)},
        "sample_attention": {f"alpha {a}": {"policy": "sample_attention", "alpha": a} for a in (0.9, 0.95, 0.98, 0.99)},
        "a_shape": {
            f"window {w}": {"policy": "a_shape", "sink_tokens": 16, "local_window": round(w * scale)} for w in windows
        },
        "tri_shape": {
            f"window {w}": {
                "policy": "tri_shape",
                "sink_tokens": 16,
                "local_window": round(w * scale),
                "last_rows": 64,
            }
            for w in windows
        },
    }
