"""Pictures of a run. matplotlib is an extra: ``pip install loopserve[plot]``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from loopserve.core.errors import ConfigError


def plot_demo(result: dict[str, Any], path: str | Path) -> None:
    """Answers right by turn, and what each stack computes and reads as shares of dense; written as an image file."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("--plot needs matplotlib: pip install 'loopserve[plot]'") from error
    stacks: dict[str, dict[str, Any]] = result["stacks"]
    figure = Figure(figsize=(11, 5), layout="constrained")
    right, costs = figure.subplots(1, 2)
    turns = len(next(iter(stacks.values()))["turns"])
    width = 0.8 / len(stacks)
    for number, (name, figures) in enumerate(stacks.items()):
        shares = [turn["right"] / turn["asked"] for turn in figures["turns"]]
        places = [turn + (number - (len(stacks) - 1) / 2) * width for turn in range(turns)]
        right.bar(places, shares, width, label=name)
    right.set_xticks(range(turns), [f"turn {turn + 1}" for turn in range(turns)])
    right.set(ylabel="share of answers right", ylim=(0, 1.02), title="Answers")
    right.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=3)
    bars = {
        "prefill cells": [figures["prefill_cell_density"] for figures in stacks.values()],
        "KV pairs attended": [figures["attended_fraction"] for figures in stacks.values()],
        "KV bytes per token": [_bytes_share(figures) for figures in stacks.values()],
    }
    width = 0.8 / len(bars)
    for number, (label, values) in enumerate(bars.items()):
        places = [place + (number - 1) * width for place in range(len(stacks))]
        costs.bar(places, [value or 0.0 for value in values], width, label=label)
    costs.set_xticks(range(len(stacks)), list(stacks), rotation=20)
    costs.set(ylabel="share of dense", title="Cost")
    costs.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=3)
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot write the plot ({error})") from error


def _bytes_share(figures: dict[str, Any]) -> float | None:
    dense = figures["dense_kv_bytes_per_token"]
    return figures["kv_bytes_per_token"] / dense if dense else None
