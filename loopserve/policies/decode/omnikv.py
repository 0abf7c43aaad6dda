"""Implement OmniKV: a few layers attend to everything and select for the layers behind them, in every step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor

from loopserve.core.kv.selection import KVSelection
from loopserve.core.policy.base import PolicyConfig
from loopserve.core.policy.interfaces import AttentionInputs, DecodeCompressor
from loopserve.core.policy.layers import LayerSpec
from loopserve.kernels.top_columns import top_columns

_DEPTHS = (1 / 16, 1 / 4, 9 / 16)  # of the authors' filter layers 2, 8 and 18 in a model of 32 layers


@dataclass
class OmniKVState:
    """Hold the columns ``[S]`` that the last filter layer of the current pass selected, None if it selected nothing."""

    columns: Tensor | None = None
    boundary: int = 0


class OmniKVDecode(DecodeCompressor[OmniKVState]):
    """Let a few filter layers attend to everything in each step, and the layers behind each to the pairs that it attends to most
    (OmniKV).

    Paper: https://openreview.net/forum?id=ulCAPXYXfa (ICLR 2025). IndexCache, https://arxiv.org/abs/2603.12201, shares the selections
    of a few layers with the others as well, in models with a trained indexer. Variant: the attention of the current query over the
    input, the largest of all query heads, ranks the pairs of a filter layer. All heads of the following layers get the same ``budget``
    pairs, until the next filter layer. Layers before the first filter layer attend to everything. By default the filter layers lie as
    deep as the authors' in Llama-3-8B (2, 8 and 18 of 32).

    Deviations: the pairs that are not selected stay where they are; the authors move them to the CPU. This turn's outputs are attended
    in addition. The paper observes a window of the last queries as an option; here it is the current query alone. The filter layers
    are not searched for by a calibration run.

    Multi-turn: selected again in every step over the whole store, which keeps everything.
    """

    name: ClassVar[str] = "omnikv"
    paper: ClassVar[str] = "https://openreview.net/forum?id=ulCAPXYXfa"

    class Config(PolicyConfig):
        budget: int = Field(
            1024, gt=0, description="KV pairs of the input attended per KV head in the layers behind a filter layer."
        )
        filter_layers: tuple[int, ...] | None = Field(
            None, description="Layers that attend to everything and select; by default three, placed by depth."
        )

        @model_validator(mode="after")
        def _filters_rise(self) -> OmniKVDecode.Config:
            layers = self.filter_layers
            if layers is not None and (not layers or min(layers) < 0 or list(layers) != sorted(set(layers))):
                raise ValueError(f"filter_layers must be layer numbers in ascending order, at least one, got {layers}")
            return self

    config: Config

    @property
    def most_pairs(self) -> int | None:
        """Set no limit, since filter layers attend to everything."""
        return None

    def init_state(self) -> OmniKVState:
        return OmniKVState()

    def end_turn(self, state: OmniKVState) -> None:
        state.columns = None

    def filters(self, layers: tuple[LayerSpec, ...]) -> tuple[int, ...]:
        """Return the filter layers among the layers of this policy, as numbers of the model's layers."""
        own = [each.index for each in layers]
        if self.config.filter_layers is not None:
            return tuple(each for each in self.config.filter_layers if each in own)
        return tuple(own[place] for place in default_places(len(own)))

    def before_attention(self, inputs: AttentionInputs, state: OmniKVState) -> KVSelection | None:
        filters = self.filters(inputs.compressor_layers)
        if not filters or inputs.layer.index < filters[0]:
            return None
        if inputs.layer.index in filters:
            self._select(inputs, state)
            return None
        if state.columns is None:
            return None
        columns = state.columns.to(inputs.keys.device).expand(inputs.keys.shape[0], -1)
        return KVSelection.uniform(columns, state.boundary, fleeting=True)

    def _select(self, inputs: AttentionInputs, state: OmniKVState) -> None:
        """Rank the pairs of the input by the current query in a filter layer."""
        state.boundary = inputs.total_tokens - 1 - inputs.output_index
        state.columns = None
        if state.boundary <= self.config.budget:
            return
        row = torch.zeros(1, dtype=torch.long, device=inputs.queries.device)
        attention = inputs.row_attention(row).probabilities[:, 0, : state.boundary]  # [Hq, boundary]
        state.columns = top_columns(attention.amax(0, keepdim=True), self.config.budget)[0]


def default_places(layers: int) -> tuple[int, ...]:
    """Return the places of the filter layers among ``layers`` layers. Each has a layer behind it to select for."""
    places: list[int] = []
    for depth in _DEPTHS:
        place = int(layers * depth)
        if (not places or place > places[-1] + 1) and place < layers - 1:
            places.append(place)
    return tuple(places)
