"""Implement A-shape prefill: the first tokens and a local window."""

from __future__ import annotations

from typing import ClassVar

from loopserve.core.policy.interfaces import AttentionInputs, PrefillSparsifier
from loopserve.core.policy.patterns import AttentionPattern, DensePattern, LinePattern
from loopserve.policies.lines import sink_lines
from loopserve.policies.prefill.local_window import LocalWindowConfig


class AShapePrefill(PrefillSparsifier):
    """Attend from each new token to the first tokens of the conversation and to a window of the tokens right before it.

    Paper: StreamingLLM, https://arxiv.org/abs/2309.17453. The code of MInference and SCBench calls this pattern A-shape. Variant:
    lines of exact length, one vertical per sink token and one slash per offset.

    Deviations: SCBench uses 128 sinks and 3,968 local tokens, which is dense below 4k tokens (preset ``a_shape-paper``); the local
    default here is smaller, and ``local_share`` lets the window grow with the conversation (preset ``a_shape``).
    Its kernels round the window to blocks of 64 and assume as many queries as keys. Here the window is exact, and a follow-up turn
    may have any length.

    Multi-turn: the window reaches back from each new token into the history, so a new turn sees the beginning and the end of the
    history and no tokens between them. After an eviction, window and sinks are counted over the surviving pairs.
    """

    name: ClassVar[str] = "a_shape"
    paper: ClassVar[str] = "https://arxiv.org/abs/2309.17453"

    class Config(LocalWindowConfig):
        """Take sinks and window."""

    config: Config

    def sparsify(self, inputs: AttentionInputs) -> AttentionPattern:
        config, heads = self.config, inputs.queries.shape[0]
        local = config.window(inputs.total_tokens)
        if config.sink_tokens + local >= inputs.total_tokens:
            return DensePattern(heads, inputs.new_tokens, inputs.total_tokens)
        sinks = sink_lines(inputs, config.sink_tokens)
        return LinePattern.window(heads, inputs.new_tokens, inputs.total_tokens, sinks, local)
