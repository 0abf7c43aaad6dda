"""Tell retrieval heads from streaming heads: shared by both phases of ``duo``, and by the search that writes its file."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from loopserve.core.errors import ConfigError
from loopserve.core.policy.base import PolicyConfig
from loopserve.core.policy.interfaces import AttentionInputs
from loopserve.core.policy.layers import LayerSpec
from loopserve.policies.head_files import misfit, read_head_file, write_head_file

HeadScores = Mapping[int, Sequence[float]]
_ROWS = 64  # rows whose attention scores a layer's heads


class SplitConfig(PolicyConfig):
    """Define the options that decide which heads are retrieval heads. Both phases need the same ones."""

    retrieval_share: float = Field(
        0.5,
        gt=0,
        le=1,
        description="Share of the KV heads that attend to everything: of the model's, or of each layer's.",
    )
    heads: str | None = Field(
        None,
        description="YAML or JSON file with a score per KV head, as `loopserve policies search-duo` writes it; else measured.",
    )
    sink_tokens: int = Field(64, ge=0, description="First tokens of the conversation that streaming heads attend to.")
    recent_window: int = Field(256, gt=0, description="Last tokens that streaming heads attend to.")
    calibration_tokens: int = Field(
        1024, gt=0, description="Stored pairs from which on heads are measured; every head attends to all before."
    )


class _ScoresFile(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str | None = Field(None, description="What the heads were measured on.")
    layers: dict[int, list[float]] = Field(description="Per layer, per KV head: its score. Larger is a retrieval head.")


def read_scores(path: str) -> HeadScores:
    """Return scores per KV head by layer. Raises ConfigError, with the place, for a file that has another form."""
    found = read_head_file(path, _ScoresFile, "a heads file says layers: {0: [0.31, 0.02, ...]}").layers
    if not any(found.values()) or not all(math.isfinite(score) for heads in found.values() for score in heads):
        raise ConfigError(f"{path}: layers: needs a finite number for each KV head of each layer")
    return found


def write_scores(path: str, scores: HeadScores, model: str) -> None:
    """Write scores per KV head by layer. Raises ConfigError if the file cannot be written."""
    write_head_file(path, {layer: [round(each, 6) for each in row] for layer, row in scores.items()}, model)


def best_share(scores: Mapping[int, Sequence[float]], share: float) -> dict[int, list[bool]]:
    """Return which heads are among the best ``share`` of all layers' heads, rounded up. Ties: the lower layer and head first."""
    ranked = sorted((-score, layer, head) for layer, heads in scores.items() for head, score in enumerate(heads))
    best = {(layer, head) for _, layer, head in ranked[: math.ceil(share * len(ranked))]}
    return {layer: [(layer, head) in best for head in range(len(heads))] for layer, heads in scores.items()}


def _rows_to_score(new_tokens: int, first: int) -> list[int]:
    """Return up to 64 rows from ``first`` on, evenly spread, the last one among them."""
    candidates = new_tokens - first
    count = min(_ROWS, candidates)
    return [first + (step + 1) * candidates // count - 1 for step in range(count)]


def far_mass(inputs: AttentionInputs, sink_tokens: int, recent_window: int, *, kind: str) -> Tensor:
    """Return the share of attention outside of sinks and recent window, per KV head: float32 ``[Hkv]``.

    The mean over rows that see further than both, and over the query heads of a group. At least one row must. kind: the figure
    that the bytes read are added to.
    """
    history = inputs.total_tokens - inputs.new_tokens
    first = max(sink_tokens + recent_window - history, 0)
    rows = torch.tensor(_rows_to_score(inputs.new_tokens, first), dtype=torch.long, device=inputs.keys.device)
    weights = inputs.row_attention(rows, kind=kind).probabilities
    columns = torch.arange(inputs.total_tokens, device=weights.device)
    start = 0 if inputs.first_valid is None else inputs.first_valid.repeat_interleave(inputs.group)[:, None, None]
    far = (columns >= start + sink_tokens) & (inputs.columns[rows][:, None] - columns >= recent_window)
    mass: Tensor = (weights * far).sum(-1).mean(-1).unflatten(0, (-1, inputs.group)).mean(-1)
    return mass


def measurable(inputs: AttentionInputs, config: SplitConfig) -> bool:
    """Return whether a prefill call is long enough to tell heads apart."""
    return inputs.total_tokens >= max(config.calibration_tokens, config.sink_tokens + config.recent_window + 1)


def measured_split(inputs: AttentionInputs, config: SplitConfig, *, kind: str) -> Tensor:
    """Return the retrieval heads of a layer, those with most far mass: bool ``[Hkv]``. Both phases of a call get the same.

    ``retrieval_share`` of the layer's heads, rounded up. Ties: the lower head first.
    """
    key = ("duo", config.retrieval_share, config.sink_tokens, config.recent_window)
    if key not in inputs.scratch:
        mass = far_mass(inputs, config.sink_tokens, config.recent_window, kind=kind)
        order = mass.argsort(descending=True, stable=True)
        split = torch.zeros(len(mass), dtype=torch.bool, device=mass.device)
        split[order[: math.ceil(config.retrieval_share * len(mass))]] = True
        inputs.scratch[key] = split
    found: Tensor = inputs.scratch[key]
    return found


class HeadSplit:
    """Hold the split that a heads file gives, or nothing. Immutable, so that a policy may keep it."""

    def __init__(self, config: SplitConfig) -> None:
        """Read the file. Raises ConfigError for a file that holds no scores."""
        self.path = config.heads
        self._given = best_share(read_scores(config.heads), config.retrieval_share) if config.heads else {}

    def refuses(self, layer: LayerSpec) -> str | None:
        """Return why the file does not fit a layer, or None."""
        if self.path is None:
            return None
        return misfit(self._given, layer.index, layer.kv_heads, self.path, kind="scores", of="KV heads", searched=True)

    def of(self, layer: int, device: torch.device) -> Tensor | None:
        """Return the retrieval heads of a layer: bool ``[Hkv]``; None without a file."""
        heads = self._given.get(layer)
        return None if heads is None else torch.tensor(heads, dtype=torch.bool, device=device)
