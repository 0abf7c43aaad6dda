"""Sum up the turns of a load: figures under the names of ``vllm bench serve``, and a table by turn."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from loopserve.bench.serving.client import TurnTimes
from loopserve.core.errors import ConfigError

METRICS = ("ttft", "tpot", "itl", "e2el")


def read_goodput(given: Sequence[str]) -> dict[str, float]:
    """Return limits in milliseconds by metric, from texts like ``ttft:500``. Raises ConfigError."""
    found = {}
    for each in given:
        name, _, value = each.partition(":")
        try:
            found[name] = float(value)
        except ValueError:
            raise ConfigError(f"--goodput {each!r}: write a metric and milliseconds, as ttft:500") from None
        if name not in ("ttft", "tpot", "e2el"):
            raise ConfigError(f"--goodput {each!r}: {name!r} is no metric of a request (known: ttft, tpot, e2el)")
    return found


def summary(
    turns: Sequence[TurnTimes],
    seconds: float,
    *,
    metrics: Sequence[str] = METRICS,
    percentiles: Sequence[float] = (50.0, 99.0),
    goodput: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Return the figures of a load. Times are milliseconds; failed turns count as errors only."""
    good = [each for each in turns if each.error is None]
    prompt, cached = sum(each.prompt_tokens for each in good), sum(each.cached_tokens for each in good)
    output = sum(each.output_tokens for each in good)
    errors: dict[str, int] = {}
    for each in turns:
        if each.error is not None:
            errors[each.error] = errors.get(each.error, 0) + 1
    found: dict[str, Any] = {
        "duration": seconds,
        "completed": len(good),
        "failed": len(turns) - len(good),
        "total_input_tokens": prompt,
        "total_output_tokens": output,
        "cached_tokens": cached,
        "cached_share": cached / prompt if prompt else 0.0,
        "request_throughput": len(good) / seconds,
        "output_throughput": output / seconds,
        "total_token_throughput": (prompt + output) / seconds,
        "request_goodput": len([each for each in good if _is_good(each, goodput)]) / seconds if goodput else None,
        "errors": errors,
    }
    for name in metrics:
        found |= _figures(name, [value * 1e3 for each in good for value in _values(each, name)], percentiles)
    numbers = sorted({each.turn for each in good})
    found["turns"] = [_turn(number, [each for each in good if each.turn == number], percentiles) for number in numbers]
    return found


def _turn(number: int, turns: Sequence[TurnTimes], percentiles: Sequence[float]) -> dict[str, Any]:
    found: dict[str, Any] = {"turn": number + 1, "completed": len(turns)}
    for name in ("ttft", "itl", "e2el"):
        found |= _figures(name, [value * 1e3 for each in turns for value in _values(each, name)], percentiles)
    prompt = sum(each.prompt_tokens for each in turns)
    found["input_tokens"] = prompt / len(turns)
    found["cached_share"] = sum(each.cached_tokens for each in turns) / prompt if prompt else 0.0
    return found


def _values(turn: TurnTimes, metric: str) -> list[float]:
    if metric == "itl":
        return turn.itl
    value = {"ttft": turn.ttft, "tpot": turn.tpot, "e2el": turn.e2e}[metric]
    return [] if value is None else [value]


def _is_good(turn: TurnTimes, goodput: Mapping[str, float]) -> bool:
    return all(value * 1e3 <= limit for name, limit in goodput.items() for value in _values(turn, name))


def _figures(name: str, values: Sequence[float], percentiles: Sequence[float]) -> Mapping[str, float | None]:
    if not values:
        return {f"mean_{name}_ms": None, f"median_{name}_ms": None, f"std_{name}_ms": None} | {
            f"p{share:g}_{name}_ms": None for share in percentiles
        }
    return {
        f"mean_{name}_ms": statistics.fmean(values),
        f"median_{name}_ms": statistics.median(values),
        f"std_{name}_ms": statistics.pstdev(values),
    } | {f"p{share:g}_{name}_ms": percentile(values, share) for share in percentiles}


def percentile(values: Sequence[float], share: float) -> float:
    """Return a percentile of values, interpolated as numpy does it. share: 0 to 100."""
    ordered = sorted(values)
    at = (len(ordered) - 1) * share / 100
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)
