"""Implement KVzip: keep the pairs that the model attends to when it reads its context a second time."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from pydantic import Field, field_validator
from torch import Tensor
from torch.nn.functional import pad

from loopserve.core.kv.selection import Retention
from loopserve.core.policy.base import Capabilities
from loopserve.core.policy.interfaces import AttentionInputs, Observation, Phase, Step
from loopserve.core.policy.scoring import ScoredCompressor, ScoredConfig, ScoredState

_ROWS = 256  # rows whose attention over a chunk is in memory at once


@dataclass
class KVzipState(ScoredState):
    """Hold what a scored state holds, and how far the conversation has been read again.

    statistics: by layer, the score of each position ``[Hkv, length]``.
    """

    scored_to: int = 0  # every position before it has a score
    start: int = 0  # the chunk that is read now; empty if none is
    end: int = 0
    length: int = 0  # tokens of the conversation that is read again


class KVzipDecode(ScoredCompressor):
    """Keep the pairs that receive most attention while the model reads its own context once more (KVzip).

    Paper: https://arxiv.org/abs/2505.23416. Variant: at the end of a turn's prefill all tokens without a score are read again behind
    the conversation, ``chunk`` at a time, which is what a model would write that repeats them. The softmax of these rows is taken
    over the first tokens, the chunk itself and the rows, as in the authors' code; the score of a pair is the largest share that any
    row and any query head of its group gives it. A score does not depend on what is asked, so it holds for all later questions.

    Deviations: the instruction to repeat is ``prompt``, token ids of the model's vocabulary, by default none: the repeated text alone
    lets the model copy. Where a chunk begins, the authors also quote the end of the one before it. Every head has the same budget,
    where the authors compare all heads and layers; put ``adakv`` around it for budgets by head. The first tokens and the last of the
    input are always kept. The model needs positions for the conversation and one chunk.

    Multi-turn: scores are kept, so each turn reads only its own tokens and the last answer again. With ``evict`` the store is reduced
    to the best of all turns so far; with ``keep`` every pair can be selected in the next turn.
    """

    name: ClassVar[str] = "kvzip"
    paper: ClassVar[str] = "https://arxiv.org/abs/2505.23416"
    capabilities: ClassVar[Capabilities] = Capabilities(retentions=frozenset(Retention), observes=True)

    class Config(ScoredConfig):
        chunk: int = Field(2048, gt=0, description="Tokens that are read again in one pass.")
        prompt: tuple[int, ...] = Field((), description="Token ids in front of each chunk that is read again.")

        @field_validator("prompt")
        @classmethod
        def _token_ids(cls, prompt: tuple[int, ...]) -> tuple[int, ...]:
            if any(token < 0 for token in prompt):
                raise ValueError(f"prompt must hold token ids, got {prompt}")
            return prompt

    config: Config

    @property
    def reads_again(self) -> int:
        return self.config.chunk + len(self.config.prompt)

    def init_state(self) -> KVzipState:
        return KVzipState()

    def asks(self, step: Step, state: ScoredState) -> Observation | None:
        assert isinstance(state, KVzipState)
        if step.phase is Phase.PREFILL and step.final and step.length > self.config.budget:
            state.start, state.length = state.scored_to, step.length
        elif step.phase is Phase.OBSERVE and state.end > state.start:
            state.start = state.scored_to = state.end
        else:
            return None
        state.end = min(state.start + self.config.chunk, state.length)
        if state.start == state.end:
            return None
        return Observation(torch.arange(state.start, state.end, device="cpu"), again=True, prompt=self.config.prompt)

    def observe(self, inputs: AttentionInputs, state: ScoredState) -> None:
        assert isinstance(state, KVzipState)
        if inputs.phase is not Phase.OBSERVE or state.end == state.start:
            return
        behind = inputs.new_tokens + state.length - state.end  # columns after the chunk
        columns = slice(inputs.total_tokens - behind - (state.end - state.start), inputs.total_tokens - behind)
        found = reconstruction(inputs, columns, self.limits.sink_tokens)
        inputs.record.read("scoring", found.numel() * inputs.keys.shape[2] * inputs.keys.element_size())
        held = state.statistics.get(inputs.layer.index, found[:, :0])[:, : state.start]
        state.statistics[inputs.layer.index] = torch.cat([pad(held, (0, state.start - held.shape[1])), found], dim=1)

    def ranked_call(self, inputs: AttentionInputs, state: ScoredState) -> AttentionInputs | None:
        assert isinstance(state, KVzipState)
        reading = inputs.phase is Phase.OBSERVE and state.end > state.start
        return without_last(inputs) if reading and state.end == state.length else None

    def score(self, inputs: AttentionInputs) -> Tensor:
        """Return the largest attention of any row of the call: the formula for rows that are not read again."""
        return inputs.token_scores(inputs.queries, inputs.columns, over_rows="max")

    def ranking(self, inputs: AttentionInputs, state: ScoredState, budget: int) -> Tensor:
        scores: Tensor = state.statistics[inputs.layer.index]
        return scores.gather(1, inputs.positions.expand(len(scores), -1).clamp(min=0))


def reconstruction(inputs: AttentionInputs, chunk: slice, sinks: int) -> Tensor:
    """Return the largest attention that each pair of a chunk gets from rows that are the last columns: float32 ``[Hkv, m]``.

    chunk: the columns of the chunk. The softmax is over the first ``sinks`` pairs before the chunk, the chunk and the rows so far.
    """
    heads, total, _ = inputs.keys.shape
    rows, size = inputs.new_tokens, chunk.stop - chunk.start
    found = torch.zeros(heads, size, dtype=torch.float32, device=inputs.keys.device)
    starts = inputs.first_valid.tolist() if inputs.first_valid is not None else [0] * heads
    for head, start in enumerate(starts):
        first = inputs.keys[head, start : max(start, min(start + sinks, chunk.start))]
        keys = torch.cat([first, inputs.keys[head, chunk], inputs.keys[head, total - rows :]]).float()
        own = inputs.queries[head * inputs.group : (head + 1) * inputs.group]
        for part in torch.arange(rows, device=keys.device).split(_ROWS):
            logits = own[:, part].float() @ keys.T * inputs.scaling
            if inputs.softcap:
                logits = inputs.softcap * torch.tanh(logits / inputs.softcap)
            later = torch.arange(rows, device=keys.device) > part[:, None]
            logits[:, :, len(keys) - rows :].masked_fill_(later, float("-inf"))
            shares = logits.softmax(-1)[:, :, len(first) : len(first) + size]
            found[head] = torch.maximum(found[head], shares.amax((0, 1)))
    return found


def without_last(inputs: AttentionInputs) -> AttentionInputs:
    """Return a call as if the pairs of its own rows, the last columns, were not stored."""
    kept = inputs.total_tokens - inputs.new_tokens
    return replace(
        inputs,
        keys=inputs.keys[:, :kept],
        values=inputs.values[:, :kept],
        positions=inputs.positions[..., :kept],
        scratch={},
    )
