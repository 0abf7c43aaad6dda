"""Say what a turn needs next, one forward pass at a time, and take in what the pass gave."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from loopserve.core.engine.answer import AnswerPlan
from loopserve.core.engine.forward import ForwardContext, Model
from loopserve.core.engine.sampling import ChosenLogprob, FinishReason, Sampler
from loopserve.core.engine.session import Session
from loopserve.core.errors import InputError, PolicyError, PolicyFault
from loopserve.core.guard.faults import FAULTS
from loopserve.core.guard.guard import check_observation, check_selection
from loopserve.core.kv.recording import plain_tensors
from loopserve.core.policy.interfaces import DecodeCompressor, Observation, Phase, Selections, Step


class Turn:
    """Drive one turn of a session: its prefill in pieces, the observations that compressors ask for, then one token after another.

    Call ``step`` for the next pass, run it, and hand the result to ``take``, until ``finished``. A turn that is closed before it
    is finished is taken back whole.
    """

    @plain_tensors()
    def __init__(
        self,
        session: Session,
        new_tokens: Sequence[int] | None,
        plan: AnswerPlan,
        *,
        model: Model,
        logits: Tensor | None = None,
        chunk_tokens: int = 4096,
        measure: bool = False,
    ) -> None:
        """Begin a turn with ``new_tokens``, or go on with one whose prefill is done and gave ``logits`` (``new_tokens`` None).

        plan: how it is answered; one without ``choose`` stops after the prefill, with ``logits`` set. chunk_tokens: longest piece
        of a prefill.
        """
        self.session = session
        self.plan = plan
        self.logits = logits
        self.output: list[int] = []
        self.finished = False
        self.finish_reason: FinishReason | None = None  # set once the answer is complete
        self.stop_string: str | None = None  # the one that ended the answer
        self.error: BaseException | None = None
        self._model, self._measure, self._chunk_tokens = model, measure, chunk_tokens
        self._observations: deque[tuple[str, Observation]] = deque()
        self._started = time.perf_counter()  # copies to go back to are a part of what a turn costs
        self._prefilled = new_tokens is None
        self._phase = Phase.PREFILL
        session.require_rest()
        if new_tokens is not None:
            if session.cache.seen and session.rotation != model.rotation(len(session.tokens) + len(new_tokens)):
                session.release_store()  # the stored keys are rotated for another length
            session.begin_turn(new_tokens)
        elif not session.turns or session.cache.seen != len(session.tokens):
            raise InputError("no turn waits for an answer: prefill one first")
        self._stats = session.stats
        session.busy = True
        self._plan_prefill(len(session.tokens))
        if logits is not None:
            self._settle(lambda: self._next_token(logits))

    def _plan_prefill(self, end: int) -> None:
        """Compute the tokens up to ``end`` in pieces of equal size before anything is decoded."""
        session, self._prefill_end = self.session, end
        waiting = end - session.cache.seen
        if waiting:
            session.rotation = self._model.rotation(end)
        self._piece = -(-waiting // max(1, -(-waiting // self._chunk_tokens)))
        session.cache.reserve(waiting - self._piece + self.plan.max_new_tokens)

    # Before a pass.

    def step(self, max_tokens: int | None = None) -> ForwardContext:
        """Return the context of the next pass; a piece of prefill takes at most ``max_tokens`` tokens."""
        session = self.session
        if self.finished:
            raise InputError("the turn is over: nothing of it is left to compute")
        if self._observations:
            return observation_context(session, *self._observations[0], self._model)
        seen = session.cache.seen
        if seen >= self._prefill_end and not self._model.rotation_grows:
            self._keep_rotation(seen + 1)
            seen = session.cache.seen
        if seen < self._prefill_end:
            size = self._piece if max_tokens is None else min(self._piece, max_tokens)
            end = min(seen + max(1, size), self._prefill_end)
            return self._compute(Phase.PREFILL, seen, end)
        return self._compute(Phase.DECODE, seen, seen + 1)

    def _keep_rotation(self, tokens: int) -> None:
        """Plan to compute everything again if the answer has made the conversation so long that its keys are rotated otherwise."""
        session = self.session
        if session.rotation != self._model.rotation(tokens):
            session.stats.count("computed_anew")
            session.begin_anew()
            self._plan_prefill(tokens)

    @property
    def waiting(self) -> int:
        """Prompt tokens that are not computed yet."""
        return max(0, self._prefill_end - self.session.cache.seen)

    @property
    def logprobs(self) -> list[ChosenLogprob] | None:
        """Log-probabilities of the output tokens; None where the sampling settings do not ask for them."""
        sampler = self.plan.choose
        return sampler.logprobs if isinstance(sampler, Sampler) and sampler.config.logprobs else None

    def _compute(self, phase: Phase, start: int, end: int) -> ForwardContext:
        session = self.session
        session.enter(phase)
        decodes = phase is Phase.DECODE
        return ForwardContext(
            session,
            phase,
            session.tokens[start:end],
            torch.arange(start, end, device=self._model.device),
            stored_after=end,
            rotation=self._model.rotation(end) if decodes else session.rotation,
            final=end >= self._prefill_end,
            measure=self._measure,
        )

    # After a pass.

    def take(self, context: ForwardContext, logits: Tensor | None, seconds: float) -> None:
        """Take in a finished pass: let the compressors answer, then choose the next token if nothing else is to be computed.

        logits ``[vocabulary]`` of the pass's last token; None where ``context.error`` ended the session's share of it. seconds:
        how long the pass took. An exception ends the turn with ``error`` set, and takes it back.
        """
        if self.output:
            self.session.stats.decode_ms += seconds * 1e3
        self._settle(lambda: self._take(context, logits), context)

    def _take(self, context: ForwardContext, logits: Tensor | None) -> None:
        if context.error is not None:
            raise context.error
        if context.phase is Phase.OBSERVE:
            self._observations.popleft()
        else:
            self.logits, self._phase = logits, context.phase
        self._observations.extend(ask_compressors(context))
        if self._observations:
            return
        self.session.enter(self._phase)
        self.session.look_for_references()
        if self.session.cache.seen >= self._prefill_end:
            assert self.logits is not None
            self._next_token(self.logits)

    def _settle(self, work: Callable[[], None], context: ForwardContext | None = None) -> None:
        """Do a part of the turn's work; an error of it ends the turn, or has the conversation computed anew."""
        try:
            work()
        except PolicyFault as fault:
            if context is None or not fault.damaged or self.session.guard.raises:
                self.fail(fault)
            else:
                self._compute_anew(context)
        except Exception as error:
            self.fail(error)
        except BaseException:  # Ctrl-C is the caller's, the turn is ours
            self.close()
            raise

    def _compute_anew(self, context: ForwardContext) -> None:
        """Compute everything again, dense: the stored pairs were written to."""
        if context.phase is Phase.DECODE and not context.counted:
            count_step(context)
        self.session.stats.count("computed_anew")
        self._observations.clear()
        self.session.serve_dense()
        self._plan_prefill(max(self._prefill_end, context.stored_after))

    def _next_token(self, logits: Tensor) -> None:
        session, stats = self.session, self.session.stats
        if self.plan.choose is None:
            self._finish(complete=False)
            return
        started = time.perf_counter()
        token = self.plan.choose(logits)
        if not 0 <= token < len(logits):
            raise InputError(f"token {token} was chosen, but the vocabulary has {len(logits)} tokens")
        now = time.perf_counter()
        if self.output:
            stats.decode_ms += (now - started) * 1e3
        elif self._prefilled:
            stats.ttft_ms += (now - started) * 1e3
        else:
            stats.ttft_ms = (now - self._started - stats.measuring_s) * 1e3
        self.output.append(token)
        session.tokens.append(token)
        stats.output_tokens = len(self.output)
        if len(self.output) == 1:  # a policy that cannot say what it holds is found out before it selects
            weigh(session)
        if self.plan.stop_check is not None:
            self.stop_string = self.plan.stop_check(token)
        if token in self.plan.stop_ids or self.stop_string is not None:
            self.finish_reason = FinishReason.STOP
        elif len(self.output) >= self.plan.max_new_tokens:
            self.finish_reason = FinishReason.LENGTH
        if self.finish_reason is not None:
            self._finish(complete=True)

    def _finish(self, *, complete: bool) -> None:
        """complete: the turn has its answer; else its prefill is done and the answer is still to come."""
        stats = self.session.stats
        if complete:
            weigh(self.session)
            self.session.end_turn()
        self.session.busy, self.finished = False, True
        if not complete:
            stats.ttft_ms = (time.perf_counter() - self._started - stats.measuring_s) * 1e3

    def fail(self, error: BaseException) -> None:
        """End the turn with an error; it is taken back whole."""
        self.error = error
        self.session.damaged |= isinstance(error, PolicyFault) and error.damaged
        self.close()

    def close(self) -> None:
        """End the turn. One that is not finished is taken back whole."""
        if not self.finished:
            self.session.busy, self.finished = False, True
            self.take_back()

    def take_back(self) -> None:
        """Take the turn back, unless its session was closed meanwhile or holds a later turn."""
        session = self.session
        if not session.closed and not session.busy and session.turns and session.stats is self._stats:
            session.undo()


def observation_context(session: Session, slot: str, observation: Observation, model: Model) -> ForwardContext:
    """Return the context that runs some rows again, for the compressor of a slot: at their own positions, or behind the conversation.

    Raises InputError if the model has too few positions for the latter.
    """
    session.enter(Phase.OBSERVE)
    tokens = [session.tokens[position] for position in observation.positions.tolist()]
    positions, seen = observation.positions.to(model.device), session.cache.seen
    if observation.again:
        tokens = [*observation.prompt, *tokens]
        if strange := [token for token in observation.prompt if token >= model.vocabulary]:
            raise InputError(
                f"decode policy {session.slots.policies[slot].name!r} writes token {strange[0]} in front of what it reads again, the "
                f"vocabulary has the ids 0 to {model.vocabulary - 1}: give it ids of this model (its option prompt)"
            )
        if model.max_positions is not None and seen + len(tokens) > model.max_positions:
            raise InputError(
                f"decode policy {session.slots.policies[slot].name!r} reads {len(tokens)} tokens again behind the {seen} of the "
                f"conversation, the model takes {model.max_positions}: let it read fewer at once (its option chunk), or choose "
                "another policy"
            )
        positions = torch.arange(seen, seen + len(tokens), device=model.device)
        seen += len(tokens)
    return ForwardContext(
        session,
        Phase.OBSERVE,
        tokens,
        positions,
        stored_after=seen,
        rotation=session.rotation,
        observer=slot,
        again=observation if observation.again else None,
    )


def count_step(context: ForwardContext) -> None:
    """Count one decode step of a session."""
    session = context.session
    context.counted = True
    session.output_index += 1
    session.stats.decode_steps += 1
    session.stats.compressed_steps += context.compressed


def ask_compressors(context: ForwardContext) -> list[tuple[str, Observation]]:
    """After a pass: count it, ask each compressor once, carry out the selections. Returns the observations asked for, by slot."""
    session = context.session
    if context.phase is Phase.DECODE:
        count_step(context)
    if context.again is not None:
        for layer in session.cache.layers:
            layer.drop_last(len(context.token_ids))
    observations = []
    for slot, compressor in session.slots.compressors.items():
        if slot in context.shown and session.is_enabled(slot):
            request = _ask(context, slot, compressor)
            if isinstance(request, Observation):
                observations.append((slot, request))
    if context.phase is Phase.DECODE:
        session.stats.reselected_steps += context.reselected
    return observations


def _ask(context: ForwardContext, slot: str, compressor: DecodeCompressor[Any]) -> Observation | None:
    session = context.session
    step = Step(
        phase=context.phase,
        turn=session.stats.turn,
        turn_start=session.turn_start,
        length=session.cache.seen,
        output_index=session.output_index,
        final=context.final,
        layers=session.slots.layers_of(slot),
        record=session.stats,
    )
    try:
        request = session.guard.ask(compressor, compressor.after_forward, step, session.states[slot])
        if isinstance(request, Observation):
            first = 0 if request.again else session.turn_start
            if context.phase is Phase.OBSERVE:
                if context.again is None or not request.again:
                    raise PolicyError("an observation may not ask for another one")
                first = int(context.again.positions[-1]) + 1  # so that reading comes to an end
            if not session.slots.repeatable:
                raise PolicyError(
                    "asks for tokens to be computed again, which this model's recurrent or position-counting layers cannot do: "
                    "declare Capabilities(observes=True), so that it is refused when the model is loaded"
                )
            check_observation(request, first, session.cache.seen)
            return request
        if request is not None:
            _select(session, step, request)
            context.reselected |= bool(request)
    except FAULTS as error:
        session.failed(slot, error, "after_forward")
    return None


def _select(session: Session, step: Step, request: Selections) -> None:
    """Carry out a compressor's selections, once all of them have been checked."""
    if not isinstance(request, Mapping):
        raise PolicyError(
            f"after_forward must return selections by layer, an Observation or None, got {type(request).__name__}"
        )
    own = {layer.index for layer in step.layers}
    for layer, selection in request.items():
        if layer not in own:
            raise PolicyError(f"selected for layer {layer}, but it selects for the layers {sorted(own)}")
        policies = session.slots.by_layer[layer]
        check_selection(
            selection, session.cache.layers[layer], policies.retention, policies.most_pairs, session.output_index
        )
    for layer, selection in request.items():
        session.cache.layers[layer].select(selection)


def weigh(session: Session) -> None:
    """Record the bytes that a session's store, active sets and policy states hold."""
    session.stats.store_bytes = session.cache.store_bytes
    session.state_bytes = sum(_held_bytes(session, slot, each) for slot, each in session.slots.compressors.items())
    session.stats.active_bytes = session.cache.active_bytes + session.state_bytes


def _held_bytes(session: Session, slot: str, compressor: DecodeCompressor[Any]) -> int:
    if not session.is_enabled(slot):
        return 0
    try:
        return int(session.guard.ask(compressor, compressor.held_bytes, session.states[slot]))
    except FAULTS as error:
        session.failed(slot, error, "held_bytes")
        return 0
