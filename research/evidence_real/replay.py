"""Record one dense prefill and replay it to any number of decode policies, so that its cost is paid once.

A decode policy sees the queries, keys and values of a prefill and never changes them. ``ReplayModel`` therefore answers a prefill
pass that was recorded from the recording: it stores the recorded pairs and shows every layer's recorded queries. All other passes
(observations, decode steps) run on the model, for sessions of several stacks at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from loopserve.core.engine.attention import attend
from loopserve.core.engine.engine import TokenEngine
from loopserve.core.engine.forward import ForwardBatch, LayerCall
from loopserve.core.engine.session import Session
from loopserve.core.engine.turn import Turn
from loopserve.core.policy.interfaces import AttentionInputs, Phase, PrefillSparsifier
from loopserve.core.policy.patterns import AttentionPattern, DensePattern
from loopserve.core.stack.stack import PolicyStack
from loopserve.models.bridge import TransformersModel
from loopserve.policies.decode.full import FullDecode


@dataclass(frozen=True)
class Recording:
    """Hold one dense prefill: its tokens, and by layer keys and values ``[Hkv, T, D]``.

    queries: ``[Hq, T - start, D]`` and how they were attended with, for the layers that policies serve. start: position of the
    first of them; what comes before it is not replayed.
    """

    tokens: list[int]
    pairs: list[tuple[Tensor, Tensor]]
    queries: dict[int, tuple[Tensor, LayerCall]]
    start: int = 0


class ReplayModel:
    """Be a model whose recorded prefill costs nothing (``core.engine.forward.Model``)."""

    def __init__(self, model: TransformersModel, recording: Recording | None = None) -> None:
        self.model, self.recording = model, recording

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def forward(self, batch: ForwardBatch) -> Tensor:
        """Return logits ``[contexts, vocabulary]``; zeros for a prefill from the recording, whose logits nobody reads."""
        first = batch.contexts[0]
        if self.recording is None or first.phase is not Phase.PREFILL:
            return self.model.forward(batch)
        if len(batch.contexts) > 1:
            raise ValueError("a recorded prefill is replayed alone")
        start, stop = int(first.positions[0]), int(first.positions[-1]) + 1
        if start < self.recording.start or list(first.token_ids) != self.recording.tokens[start:stop]:
            raise ValueError("these tokens were not recorded")
        rows = slice(start - self.recording.start, stop - self.recording.start)
        for index, (keys, values) in enumerate(self.recording.pairs):
            first.append(index, keys[:, start:stop], values[:, start:stop])
            if index in self.recording.queries:
                queries, call = self.recording.queries[index]
                attend([first], call, [queries[:, rows]])
        return torch.zeros(1, self.model.vocabulary, dtype=torch.float32, device=first.positions.device)


@dataclass(frozen=True)
class _Unread(DensePattern):
    """Compute nothing: the output of a replayed layer is not read."""

    def attend(
        self, queries: Tensor, keys: Tensor, values: Tensor, *, need_lse: bool = False, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        return queries.new_zeros(()).expand(queries.shape), None


class _Replayed(PrefillSparsifier):
    name: ClassVar[str] = "replayed"
    paper: ClassVar[str] = ""

    def sparsify(self, inputs: AttentionInputs) -> AttentionPattern:
        return _Unread(inputs.queries.shape[0], inputs.new_tokens, inputs.total_tokens)


class _Recorder(PrefillSparsifier):
    name: ClassVar[str] = "recorder"
    paper: ClassVar[str] = ""

    def __init__(self) -> None:
        super().__init__()
        self.queries: dict[int, list[Tensor]] = {}
        self.calls: dict[int, LayerCall] = {}

    def sparsify(self, inputs: AttentionInputs) -> AttentionPattern:
        index = inputs.layer.index
        self.queries.setdefault(index, []).append(inputs.queries.clone())
        self.calls[index] = LayerCall(index, inputs.scaling, inputs.softcap)
        return DensePattern(inputs.queries.shape[0], inputs.new_tokens, inputs.total_tokens)


def replayed(stack: PolicyStack) -> PolicyStack:
    """Return the stack with a prefill that is replayed. ValueError if its own prefill is not dense."""
    parts = [stack.prefill, *(each.prefill for each in stack.overrides if each.prefill)]
    if not all(each.capabilities.passive for each in parts):
        raise ValueError(f"stack {stack.name!r}: only a dense prefill can be replayed")
    return replace(stack, prefill=_Replayed(), overrides=tuple(replace(each, prefill=None) for each in stack.overrides))


class TurnRecorder:
    """Read turns densely, and record them."""

    def __init__(self, model: TransformersModel) -> None:
        self._recorder = _Recorder()
        self._engine = TokenEngine(model, PolicyStack("recorder", self._recorder, FullDecode()))
        self._session = self._engine.session()
        self._start = 0

    def read(self, tokens: Sequence[int]) -> None:
        """Read one turn."""
        self._engine.prefill(self._session, list(tokens))

    def fork(self) -> TurnRecorder:
        """Return a recorder that goes on from here, whose recording has the queries of what it reads itself.

        This one can be forked again.
        """
        other = TurnRecorder(self._engine.model)
        adopt(other._session, self._session.fork())
        other._start = len(other._session.tokens)
        return other

    def recording(self) -> Recording:
        """Return what was read, and stop."""
        pairs = []
        for layer in self._session.cache.layers:
            assert layer.store is not None
            pairs.append((layer.store.keys, layer.store.values))
        calls = self._recorder.calls
        queries = {layer: (torch.cat(parts, dim=1), calls[layer]) for layer, parts in self._recorder.queries.items()}
        return Recording(list(self._session.tokens), pairs, queries, self._start)


def record(model: TransformersModel, tokens: Sequence[int], then: Sequence[int]) -> tuple[Recording, Tensor]:
    """Prefill ``tokens`` densely, then ``then``.

    Return the recording of both, and the logits ``[len(then), vocabulary]`` after each token of the second.
    """
    recorder = TurnRecorder(model)
    recorder.read(tokens)
    with all_logits(model) as logits:
        recorder.read(then)
    return recorder.recording(), torch.cat(logits)


@contextmanager
def all_logits(model: TransformersModel) -> Iterator[list[Tensor]]:
    """Collect, pass by pass, the logits ``[T, vocabulary]`` of all tokens, which a pass itself gives for the last one only."""
    found: list[Tensor] = []
    inner = model.model
    cap = getattr(inner.config.get_text_config(decoder=True), "final_logit_softcapping", None)

    def keep(module: torch.nn.Module, inputs: Any, output: Any) -> None:
        hidden = output.last_hidden_state[0]
        logits = inner.get_output_embeddings()(hidden)
        found.append(cap * torch.tanh(logits / cap) if cap else logits)

    hook = inner.base_model.register_forward_hook(keep)
    try:
        yield found
    finally:
        hook.remove()


def decode_together(engine: TokenEngine, turns: Sequence[Turn]) -> None:
    """Run begun turns to their ends: each prefill alone, then one decode step of all turns in each pass."""
    for turn in turns:
        while not turn.output and turn.error is None:
            engine.run_pass([turn])
    while waiting := [turn for turn in turns if not turn.finished]:
        engine.run_pass(waiting)


def adopt(session: Session, source: Session) -> None:
    """Give a new session the tokens and stored pairs of another, which is left without them."""
    session.tokens = list(source.tokens)
    session.cache = source.cache
    session.rotation = source.rotation
    session.cache.release()
