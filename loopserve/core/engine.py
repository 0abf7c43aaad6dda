"""The loop: prefill a turn, decode it token by token, let the compressors answer after each pass. Knows tokens, no text."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from loopserve.core.attention import Call
from loopserve.core.errors import (
    POLICY_TIMEOUT_S,
    ConfigError,
    InputError,
    OnPolicyFault,
    PolicyChecks,
    PolicyError,
    PolicyFault,
)
from loopserve.core.faults import FAULTS
from loopserve.core.guard import Guard
from loopserve.core.interfaces import DecodeCompressor, LayerSpec, Observation, Phase, Selections, Step
from loopserve.core.judging import check_observation, check_selection
from loopserve.core.sampling import Sampler, SamplingConfig
from loopserve.core.session import Session, assign
from loopserve.core.stack import PolicyStack

_CHUNK_TOKENS = 4096


@contextmanager
def _whole(session: Session) -> Iterator[None]:
    """While the block runs, the session is answering; a turn that does not come to the block's end is taken back."""
    session.answering = True
    complete = False
    try:
        yield
        complete = True
    finally:
        session.answering = False
        if not complete:
            session.undo()


class Model(Protocol):
    """What the loop needs of a language model; ``models.huggingface`` has one."""

    @property
    def layers(self) -> Sequence[LayerSpec]:
        """One entry per attention layer, in order."""

    @property
    def max_positions(self) -> int | None:
        """Longest conversation in tokens, None if there is no limit."""

    @property
    def device(self) -> torch.device: ...

    def forward(self, call: Call, token_ids: Tensor) -> Tensor:
        """Run token ids ``[T]`` at ``call.positions``; logits ``[vocabulary]`` of the last one."""


class TokenEngine:
    """Runs sessions of one model under one stack."""

    def __init__(
        self,
        model: Model,
        stack: PolicyStack,
        *,
        chunk_tokens: int = _CHUNK_TOKENS,
        measure_coverage: bool = False,
        policy_checks: PolicyChecks | str = PolicyChecks.CHEAP,
        on_policy_fault: OnPolicyFault | str = OnPolicyFault.RAISE,
        policy_timeout_s: float | None = POLICY_TIMEOUT_S,
    ) -> None:
        """chunk_tokens: longest piece of a prefill. measure_coverage: realised coverage over all rows, for reports.
        policy_checks, on_policy_fault, policy_timeout_s: how policies are watched, see ``core.guard``.
        """
        if chunk_tokens < 1:
            raise ConfigError(f"chunk_tokens must be at least 1, got {chunk_tokens}")
        stack.check(model.layers)
        self.model = model
        self.stack = stack
        self.chunk_tokens = chunk_tokens
        self.measure_coverage = measure_coverage
        self.guard = Guard(
            checks=policy_checks, on_fault=on_policy_fault, timeout_s=policy_timeout_s, owners=stack.owners
        )
        self._policies = assign(model.layers, stack)

    def session(self) -> Session:
        return Session(self._policies, self.guard)

    def generate(
        self, session: Session, new_tokens: Sequence[int], sampling: SamplingConfig, stop_ids: frozenset[int]
    ) -> Iterator[int]:
        """Answer one turn, token by token, the stop token included.

        A turn that is not finished (an error, Ctrl-C, a consumer that walks away) is taken back whole.
        """
        logits = self.read(session, new_tokens, room=sampling.max_new_tokens)
        yield from self.answer(session, logits, Sampler(sampling), stop_ids, sampling.max_new_tokens)

    def read(self, session: Session, new_tokens: Sequence[int], *, room: int) -> Tensor:
        """Begin a turn and compute its tokens; logits ``[vocabulary]`` of the answer's first token.

        room: tokens that the answer may have. The session rests afterwards: it can be forked, and the turn answered twice.
        """
        self._fits(session, new_tokens, room)
        started = time.perf_counter()  # copies to go back to are a part of what a turn costs
        session.begin_turn(new_tokens)
        with _whole(session):
            logits = self.prefill(session, room=room)
            session.stats.ttft_ms = (time.perf_counter() - started - session.stats.measuring_s) * 1e3
        return logits

    def answer(
        self,
        session: Session,
        logits: Tensor,
        choose: Callable[[Tensor], int],
        stop_ids: frozenset[int],
        max_new_tokens: int,
    ) -> Iterator[int]:
        """Answer the turn that ``read`` gave these logits for, token by token; left unfinished, the turn is taken back whole.

        choose: the next token of logits ``[vocabulary]``: a ``Sampler``, or ``Dictation`` for an answer that is known.
        """
        session.require_rest()
        if session.cache.seen != len(session.tokens):
            raise InputError("no turn waits for an answer: read one first")
        with _whole(session):
            started = time.perf_counter()
            token = choose(logits)
            session.stats.ttft_ms += (time.perf_counter() - started) * 1e3
            for count in range(1, max_new_tokens + 1):
                session.tokens.append(token)
                session.stats.output_tokens = count
                self._weigh(session)
                yield token
                if token in stop_ids or count == max_new_tokens:
                    session.end_turn()
                    return
                started = time.perf_counter()
                logits = self.decode(session)
                token = choose(logits)
                session.stats.decode_ms += (time.perf_counter() - started) * 1e3

    def _fits(self, session: Session, new_tokens: Sequence[int], room: int) -> None:
        if not new_tokens:
            raise InputError("a turn needs at least one token")
        limit = self.model.max_positions
        needed = len(session.tokens) + len(new_tokens) + 1
        if limit is not None and needed > limit:
            raise InputError(
                f"the conversation would be {needed} tokens long, the model takes {limit}: shorten the message, "
                "undo a turn, or start a new session"
            )
        if limit is not None and needed - 1 + room > limit:
            raise InputError(
                f"max_new_tokens={room} does not fit: {limit - needed + 1} tokens are left of the model's {limit}"
            )

    def prefill(self, session: Session, *, room: int = 0) -> Tensor:
        """Compute every token not computed yet, in chunks of equal size; logits ``[vocabulary]`` of the last one.

        room: tokens of the answer to make room for in the store.
        """
        waiting = session.tokens[session.cache.seen :]
        pieces = -(-len(waiting) // self.chunk_tokens)
        size = -(-len(waiting) // pieces)
        logits = None
        session.cache.reserve(len(waiting) - size + room)
        for start in range(0, len(waiting), size):
            chunk = waiting[start : start + size]
            logits = self._run(session, chunk, Phase.PREFILL, final=start + size >= len(waiting))
        assert logits is not None
        return logits

    def decode(self, session: Session) -> Tensor:
        """Compute the last token; logits ``[vocabulary]`` of the one after it."""
        return self._run(session, session.tokens[-1:], Phase.DECODE, final=True)

    def _run(self, session: Session, tokens: Sequence[int], phase: Phase, *, final: bool) -> Tensor:
        seen = session.cache.seen
        device = self.model.device
        positions = torch.arange(seen, seen + len(tokens), device=device)
        call = Call(
            session, phase, positions, final=final, measure=self.measure_coverage, seen_after=seen + len(tokens)
        )
        session.enter(phase)
        steps = session.stats.decode_steps
        try:
            logits = self.model.forward(call, torch.tensor(tokens, dtype=torch.long, device=device))
            self.complete(call)
        except PolicyFault as fault:
            session.damaged |= fault.damaged
            if not fault.damaged or self.guard.raises:
                raise
            if phase is Phase.DECODE and session.stats.decode_steps == steps:
                self._count_step(call)
            logits = self._renewed(session, seen + len(tokens))
            session.enter(phase)
        return logits

    def _renewed(self, session: Session, length: int) -> Tensor:
        """Logits after the first ``length`` tokens, all of them computed anew and dense: the stored pairs were written to."""
        session.stats.count("computed_anew")
        session.renew()
        for start in range(0, length, self.chunk_tokens):
            chunk = session.tokens[start : min(start + self.chunk_tokens, length)]
            logits = self._run(session, chunk, Phase.PREFILL, final=start + len(chunk) == length)
        return logits

    def _count_step(self, call: Call) -> None:
        session = call.session
        session.output_index += 1
        session.stats.decode_steps += 1
        session.stats.compressed_steps += call.compressed

    def complete(self, call: Call) -> None:
        """After a forward pass: count it, ask each compressor once, carry out its wish."""
        session = call.session
        if call.phase is Phase.DECODE:
            self._count_step(call)
        for key in session.compressors:
            self._ask(call, key)
        if call.phase is Phase.DECODE:
            session.stats.reselected_steps += call.reselected
        if self.guard.strict:
            session.look_for_references()

    def _ask(self, call: Call, key: int) -> None:
        session = call.session
        compressor = session.compressors[key]
        if not session.trusts(compressor):
            return
        step = Step(
            phase=call.phase,
            turn=session.stats.turn,
            turn_start=session.turn_start,
            length=session.cache.seen,
            output_index=session.output_index,
            final=call.final,
            layers=session.ruled_by(key),
            record=session.stats,
        )
        try:
            wish = self.guard.ask(compressor, compressor.after_forward, step, session.states[key])
            if isinstance(wish, Observation):
                if call.phase is Phase.OBSERVE:
                    raise PolicyError("an observation may not ask for another one")
                check_observation(wish, session.turn_start, session.cache.seen)
            elif wish is not None:
                self._select(session, step, wish)
                call.reselected |= bool(wish)
        except FAULTS as error:
            session.failed(compressor, error, "after_forward")
            return
        if isinstance(wish, Observation):
            self._observe(session, wish, key)

    def _select(self, session: Session, step: Step, wish: Selections) -> None:
        """Carry out a compressor's selections, once all of them have been looked at."""
        if not isinstance(wish, Mapping):
            raise PolicyError(
                f"after_forward must return selections by layer, an Observation or None, got {type(wish).__name__}"
            )
        ruled = {layer.index for layer in step.layers}
        for layer, selection in wish.items():
            if layer not in ruled:
                raise PolicyError(f"selected for layer {layer}, but it rules the layers {sorted(ruled)}")
            policies = session.policies[layer]
            check_selection(
                selection, session.cache.layers[layer], policies.retention, policies.most_pairs, session.output_index
            )
        for layer, selection in wish.items():
            session.cache.layers[layer].select(selection)

    def _observe(self, session: Session, wish: Observation, key: int) -> None:
        """Run some rows of this turn again at their own positions; nothing is appended, only ``key`` is asked."""
        before = session.stats.phase
        session.enter(Phase.OBSERVE)
        call = Call(session, Phase.OBSERVE, wish.positions.to(self.model.device), observer=key)
        token_ids = torch.tensor(session.tokens, dtype=torch.long, device=self.model.device)[call.positions]
        self.model.forward(call, token_ids)
        self._ask(call, key)
        session.enter(before)

    def _weigh(self, session: Session) -> None:
        session.stats.store_bytes = session.cache.store_bytes
        summaries = sum(self._held_bytes(session, key, each) for key, each in session.compressors.items())
        session.stats.active_bytes = session.cache.active_bytes + summaries

    def _held_bytes(self, session: Session, key: int, compressor: DecodeCompressor[Any]) -> int:
        if not session.trusts(compressor):
            return 0
        try:
            return int(self.guard.ask(compressor, compressor.held_bytes, session.states[key]))
        except FAULTS as error:
            session.failed(compressor, error, "held_bytes")
            return 0
