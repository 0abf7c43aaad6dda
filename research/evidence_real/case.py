"""A prompt and the tokens after it, under dense attention and under stacks."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch

from loopserve.api import load_stack
from loopserve.core.engine.engine import CHUNK_TOKENS, TokenEngine
from loopserve.core.engine.turn import Turn
from loopserve.core.stack.stack import PolicyStack
from loopserve.models.bridge import IMPLEMENTATION, TransformersModel
from loopserve.models.layers import set_implementation
from loopserve.models.loading import load
from research.evidence_real.comparison import Forced, Found, Reference
from research.evidence_real.costs import costs, prefill_figures
from research.evidence_real.replay import ReplayModel, adopt, all_logits, decode_together, record, replayed
from research.evidence_real.texts import continued, digest

MODEL = "smollm2"
FORCED = 176
_PACKED_TOKENS = 65_536  # of all sessions of a pass: what their stores take of the memory bounds them
_WHOLE = {"prefill": {"policy": "dense"}, "decode": {"policy": "full"}}


@lru_cache(maxsize=1)
def loaded(name: str) -> tuple[TransformersModel, Any]:
    """Return model and tokenizer, float32."""
    model, tokenizer = load(name, dtype="float32")
    set_implementation(model, IMPLEMENTATION)
    return TransformersModel(model), tokenizer


class Case:
    """Hold a prompt, the tokens after it, the recorded dense prefill and what dense attention predicts."""

    def __init__(
        self,
        model: TransformersModel,
        prompt: Sequence[int],
        forced: Sequence[int],
        content: str = "",
        *,
        chunk_tokens: int = CHUNK_TOKENS,
    ) -> None:
        """forced: one token more than predictions are compared. chunk_tokens: longest piece of a sparse prefill."""
        self.model, self.prompt, self.forced = model, list(prompt), list(forced)
        self.chunk_tokens = chunk_tokens
        self.digest = digest(content)
        self.recording, logits = record(model, self.prompt, self.forced[:-1])
        self.reference = Reference(logits, self.forced[1:])
        losses = [-float(row[target]) for row, target in zip(self.reference.logs, self.reference.targets, strict=True)]
        self.loss = sum(losses) / len(losses)

    @classmethod
    def of(cls, model: str, content: str, tokens: int, forced: int, *, chunk_tokens: int = CHUNK_TOKENS) -> Case:
        """Return the case of a text, for a model by name or directory. forced: tokens that are compared."""
        network, tokenizer = loaded(model)
        return cls(network, *continued(tokenizer, content, tokens, forced + 1), content, chunk_tokens=chunk_tokens)

    def decoding(self, stacks: Mapping[str, PolicyStack]) -> Iterable[tuple[str, Found]]:
        """Decode the forced tokens under each stack after the dense prefill, several stacks in one pass."""
        return self._in_passes(stacks, replays=True)

    def whole(self, stacks: Mapping[str, PolicyStack]) -> Iterable[tuple[str, Found]]:
        """The same with each stack's own prefill."""
        return self._in_passes(stacks, replays=False)

    def _in_passes(self, stacks: Mapping[str, PolicyStack], *, replays: bool) -> Iterable[tuple[str, Found]]:
        names, most = list(stacks), max(1, _PACKED_TOKENS // len(self.prompt))
        for start in range(0, len(names), most):
            yield from self._packed({name: stacks[name] for name in names[start : start + most]}, replays=replays)

    def _packed(self, stacks: Mapping[str, PolicyStack], *, replays: bool) -> Iterable[tuple[str, Found]]:
        model = ReplayModel(self.model, self.recording if replays else None)
        engine = TokenEngine(model, load_stack(_WHOLE), chunk_tokens=self.chunk_tokens, policy_timeout_s=None)
        turns: dict[str, Turn] = {}
        for name, stack in stacks.items():
            forced = Forced(self.forced, self.reference)
            session = engine.session(replayed(stack) if replays else stack)
            turns[name] = engine.begin(session, self.prompt, forced, max_new_tokens=len(self.forced))
        decode_together(engine, list(turns.values()))
        for name, turn in turns.items():
            if turn.error is not None:
                yield name, {"error": f"{type(turn.error).__name__}: {turn.error}"}
            else:
                choose = turn.plan.choose
                assert isinstance(choose, Forced)
                yield (
                    name,
                    choose.found()
                    | {"costs": costs(turn)}
                    | ({} if replays else {"prefill": prefill_figures(turn.session.stats)}),
                )
            turn.session.close()
        turns.clear()
        gc.collect()

    def prefilling(self, stack: PolicyStack, *, realised: bool = False) -> Found:
        """Prefill under the stack, then read the forced tokens densely: what sparse prefill alone costs.

        realised: measure what share of all rows' mass the pattern holds, as costly as dense attention.
        """
        engine = TokenEngine(
            self.model,
            load_stack(_WHOLE),
            chunk_tokens=self.chunk_tokens,
            measure_coverage=realised,
            policy_timeout_s=None,
        )
        session = engine.session(stack)
        started = time.process_time()
        engine.prefill(session, self.prompt)
        seconds = time.process_time() - started
        found = prefill_figures(session.stats) | {"seconds": round(seconds, 3)}
        reading = engine.session()
        adopt(reading, session)
        with all_logits(self.model) as logits:
            engine.prefill(reading, self.forced[:-1])
        forced = Forced(self.forced, self.reference)
        for index, row in enumerate(torch.cat(logits)):
            forced.add(index, row)
        reading.close()
        gc.collect()
        return forced.found() | {"prefill": found}
