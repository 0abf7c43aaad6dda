"""Implement the prefill half of DuoAttention: retrieval heads dense, streaming heads sinks and a window."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from loopserve.core.policy.base import PolicyConfig
from loopserve.core.policy.interfaces import AttentionInputs, PrefillSparsifier
from loopserve.core.policy.layers import LayerSpec
from loopserve.core.policy.patterns import AttentionPattern, DensePattern, LinePattern
from loopserve.policies.head_split import HeadSplit, SplitConfig, measurable, measured_split
from loopserve.policies.lines import sink_lines


class DuoPrefill(PrefillSparsifier):
    """Compute everything in retrieval heads, and sinks and a recent window in streaming heads (DuoAttention).

    Paper: https://arxiv.org/abs/2410.10819. Variant: 64 sinks and 256 recent tokens, half of the KV heads retrieval heads, as the
    paper runs models with grouped queries. All query heads of a KV head are of one kind.

    Deviations: the paper trains a gate per KV head on synthetic passkeys. Here a head's score is measured: the share of its
    attention that lies outside of sinks and recent window, mean over 64 rows and its group. With ``heads``, a file that
    ``loopserve policies search-duo`` writes once per model, heads are ranked over all layers as in the paper. The file may hold
    trained gates as well. Without it, the first prefill call of a conversation with ``calibration_tokens`` pairs ranks the heads
    of each layer, and the split stays for the conversation. Calls before it are dense.

    Multi-turn: the split does not change. A new turn's streaming heads see the beginning and the end of the history, its retrieval
    heads all of it. The decode policy ``duo`` with the same options measures the same split from the same call. After an eviction
    sinks and window are counted over the survivors.
    """

    name: ClassVar[str] = "duo"
    paper: ClassVar[str] = "https://arxiv.org/abs/2410.10819"

    class Config(SplitConfig):
        """Take the options of both phases."""

    config: Config

    def __init__(self, config: PolicyConfig | None = None) -> None:
        super().__init__(config)
        self.split = HeadSplit(self.config)

    def refuses(self, layer: LayerSpec) -> str | None:
        return self.split.refuses(layer)

    def sparsify(self, inputs: AttentionInputs) -> AttentionPattern:
        config, heads = self.config, inputs.queries.shape[0]
        size = heads, inputs.new_tokens, inputs.total_tokens
        retrieval = self._retrieval(inputs)
        if retrieval is None or config.sink_tokens + config.recent_window >= inputs.total_tokens:
            return DensePattern(*size)
        sinks = sink_lines(inputs, config.sink_tokens)
        window = LinePattern.window(*size, sinks, config.recent_window)
        return LinePattern(
            sinks, window.slashes, inputs.new_tokens, dense_heads=retrieval.repeat_interleave(inputs.group)
        )

    def _retrieval(self, inputs: AttentionInputs) -> Tensor | None:
        """Return the layer's retrieval heads, bool ``[Hkv]``, or None before they are known."""
        layer = inputs.layer.index
        if self.config.heads is not None:
            return self.split.of(layer, inputs.keys.device)
        if layer not in inputs.state and measurable(inputs, self.config):
            inputs.state[layer] = measured_split(inputs, self.config, kind="lines")
        found: Tensor | None = inputs.state.get(layer)
        return found
