"""Run the turns of sessions through one model under one stack. Knows tokens, no text."""

from __future__ import annotations

import atexit
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Unpack

import torch
from torch import Tensor

from loopserve.core.engine.answer import AnswerOptions, AnswerPlan, plan_answer
from loopserve.core.engine.break_even import BreakEven
from loopserve.core.engine.forward import ForwardBatch, ForwardContext, Model
from loopserve.core.engine.sampling import Choose, SamplingConfig
from loopserve.core.engine.session import UNDO_DEPTH, Session
from loopserve.core.engine.slots import Slots
from loopserve.core.engine.turn import Turn, ask_compressors, observation_context
from loopserve.core.errors import POLICY_TIMEOUT_S, ConfigError, InputError, ModelError, OnPolicyFault, PolicyChecks
from loopserve.core.guard.guard import Guard
from loopserve.core.kv.recording import plain_tensors
from loopserve.core.policy.interfaces import Phase
from loopserve.core.stack.stack import PolicyStack

CHUNK_TOKENS = 4096

Progress = Callable[[int, int], None]  # prompt tokens computed so far, and of the whole turn

_streams: weakref.WeakSet[Turn] = weakref.WeakSet()  # turns whose tokens are handed out one by one


class TokenEngine:
    """Run sessions of one model under one stack.

    One thread at a time runs a forward pass; turns of other threads wait for it between two passes.
    """

    def __init__(
        self,
        model: Model,
        stack: PolicyStack,
        *,
        chunk_tokens: int = CHUNK_TOKENS,
        measure_coverage: bool = False,
        policy_checks: PolicyChecks | str = PolicyChecks.CHEAP,
        on_policy_fault: OnPolicyFault | str = OnPolicyFault.RAISE,
        policy_timeout_s: float | None = POLICY_TIMEOUT_S,
        undo_depth: int = UNDO_DEPTH,
        break_even: BreakEven | None = None,
    ) -> None:
        """chunk_tokens: longest piece of a prefill. measure_coverage: realised coverage over all rows, for reports.
        policy_checks, on_policy_fault, policy_timeout_s: how policies are checked, see ``core.guard``. undo_depth: turns that can
        be taken back without computing the conversation anew. break_even: below which lengths the stack stays dense; sessions under
        another stack have none. ConfigError for what the stack or the values do not allow.
        """
        if chunk_tokens < 1:
            raise ConfigError(f"chunk_tokens must be at least 1, got {chunk_tokens}")
        if undo_depth < 1:
            raise ConfigError(f"undo_depth must be at least 1, got {undo_depth}")
        stack.check(model.layers)
        self.model = model
        self.stack = stack
        self.chunk_tokens = chunk_tokens
        self.measure_coverage = measure_coverage
        self.undo_depth = undo_depth
        self._guarding: dict[str, Any] = {
            "checks": policy_checks,
            "on_fault": on_policy_fault,
            "timeout_s": policy_timeout_s,
        }
        self.guard = Guard(**self._guarding, owners=stack.owners)
        self.slots = Slots(model.layers, stack, break_even)
        self._others: dict[PolicyStack, tuple[Slots, Guard]] = {}
        self._lock = threading.Lock()

    def session(self, stack: PolicyStack | None = None) -> Session:
        """Open a conversation, under another stack than the engine's if one is given.

        Sessions under different stacks share forward passes. ConfigError if the model cannot be served under the stack.
        """
        if stack is None or stack is self.stack:
            return Session(self.slots, self.guard, self.undo_depth)
        if stack not in self._others:
            stack.check(self.model.layers)
            guard = Guard(**self._guarding, owners=stack.owners)
            self._others.setdefault(
                stack, (Slots(self.model.layers, stack), guard)
            )  # another thread may have been faster
        return Session(*self._others[stack], self.undo_depth)

    @property
    def sessions(self) -> list[Session]:
        """The open sessions that hold memory, forks included, least recently used first."""
        slots = [self.slots, *(each for each, _ in list(self._others.values()))]
        return sorted(
            (each for part in slots for each in list(part.sessions) if not each.closed), key=lambda s: s.used_at
        )

    def generate(
        self,
        session: Session,
        new_tokens: Sequence[int],
        sampling: SamplingConfig | Choose,
        stop_ids: frozenset[int] = frozenset(),
        max_new_tokens: int | None = None,
        **options: Any,
    ) -> Iterator[int]:
        """Answer one turn, token by token, the stop token included. The arguments are those of ``begin``.

        A turn that is not finished (an error, Ctrl-C, a consumer that walks away) is taken back whole.
        """
        options |= {"stop_ids": stop_ids, "max_new_tokens": max_new_tokens}
        yield from self.finish(self.begin(session, new_tokens, sampling, **options))

    def prefill(self, session: Session, new_tokens: Sequence[int], *, max_new_tokens: int = 0) -> Tensor:
        """Begin a turn and compute its tokens; return the logits ``[vocabulary]`` of the answer's first token.

        max_new_tokens: tokens that the answer may have. The session rests afterwards: it can be forked, and the turn answered
        twice.
        """
        turn = self.begin(session, new_tokens, None, max_new_tokens=max_new_tokens)
        for _ in self.finish(turn):
            pass
        assert turn.logits is not None
        return turn.logits

    def decode(
        self,
        session: Session,
        logits: Tensor,
        sampling: SamplingConfig | Choose,
        stop_ids: frozenset[int] = frozenset(),
        max_new_tokens: int | None = None,
        **options: Any,
    ) -> Iterator[int]:
        """Answer the turn that ``prefill`` gave these logits for, token by token; left unfinished, the turn is taken back whole.

        The arguments are those of ``begin``.
        """
        self._own(session)
        session.require_rest()
        options |= {"stop_ids": stop_ids, "max_new_tokens": max_new_tokens}
        plan = plan_answer(session.tokens, self.model.max_positions, sampling, **options)
        yield from self.finish(self._turn(session, None, plan, logits))

    def plan(
        self,
        session: Session,
        new_tokens: Sequence[int],
        sampling: SamplingConfig | Choose | None,
        *,
        logits: Tensor | None = None,
        **options: Unpack[AnswerOptions],
    ) -> AnswerPlan:
        """Return how ``begin``, called with the same arguments, would answer a turn. Raises what ``begin`` would raise.

        A session that is busy is no error here.
        """
        self._own(session)
        if logits is None and not new_tokens:
            raise InputError("a turn needs at least one token")
        known = range(self.model.vocabulary)
        if strange := [each for each in new_tokens if not isinstance(each, int) or each not in known]:
            raise InputError(f"{strange[0]!r} is no token: the vocabulary has the ids 0 to {len(known) - 1}")
        return self.check_fit([*session.tokens, *new_tokens], sampling, **options)

    def check_fit(
        self, tokens: Sequence[int], sampling: SamplingConfig | Choose | None, **options: Unpack[AnswerOptions]
    ) -> AnswerPlan:
        """Return how an answer after all ``tokens`` of a conversation would be given. InputError if they do not fit the model."""
        limit = self.model.max_positions
        if limit is not None and len(tokens) + 1 > limit:
            raise InputError(
                f"the conversation would be {len(tokens) + 1} tokens long, the model takes {limit}: shorten the message, "
                "undo a turn, or start a new session"
            )
        return plan_answer(tokens, limit, sampling, **options)

    def begin(
        self,
        session: Session,
        new_tokens: Sequence[int],
        sampling: SamplingConfig | Choose | None,
        *,
        logits: Tensor | None = None,
        **options: Unpack[AnswerOptions],
    ) -> Turn:
        """Begin a turn; nothing is computed before ``run``.

        sampling: settings, a function from logits ``[vocabulary]`` to a token, or None to stop after the prefill. stop_ids:
        tokens that end the answer, unless the settings ignore them. stop_check: see ``AnswerPlan``; needed where the settings
        name stop strings, since the engine knows no text. max_new_tokens: those of the settings unless given; if these do not give
        them either, the answer ends at the model's window. logits_processors: see ``Sampler``; only beside settings. logits: those
        that a turn without ``sampling`` ended with, to answer it on its session or a fork of that; ``new_tokens`` are empty then.

        Raises InputError for a turn that does not fit the model, ConfigError for options that do not fit each other.
        """
        plan = self.plan(session, new_tokens, sampling, logits=logits, **options)
        session.require_rest()
        return self._turn(session, new_tokens if logits is None else None, plan, logits)

    def _turn(
        self, session: Session, new_tokens: Sequence[int] | None, plan: AnswerPlan, logits: Tensor | None
    ) -> Turn:
        return Turn(
            session,
            new_tokens,
            plan,
            model=self.model,
            logits=logits,
            chunk_tokens=self.chunk_tokens,
            measure=self.measure_coverage,
        )

    @plain_tensors()
    def run_pass(self, turns: Sequence[Turn], prefill_tokens: Sequence[int | None] | None = None) -> None:
        """Run one forward pass with what each of these turns needs next; ``error`` of a turn says what ended it.

        prefill_tokens: per turn, the most prompt tokens that it may compute in this pass; None = as many as its pieces have.
        """
        limits = prefill_tokens or [None] * len(turns)
        contexts: dict[Turn, ForwardContext] = {}
        with self._lock:
            for turn, limit in zip(turns, limits, strict=True):
                try:
                    if turn.session.closed and not turn.finished:
                        raise InputError("the session was closed before its answer was complete")
                    contexts[turn] = turn.step(limit)
                except Exception as error:
                    turn.fail(error)
            if not contexts:
                return
            started = time.perf_counter()
            try:
                logits: Sequence[Tensor | None] = list(self.model.forward(ForwardBatch(list(contexts.values()))))
            except Exception as error:
                for context in contexts.values():  # an error of the pass as a whole ends every turn in it
                    context.error = context.error or error
                logits = [None] * len(contexts)
            seconds = time.perf_counter() - started
        for (turn, context), row in zip(
            contexts.items(), logits, strict=True
        ):  # policies and samplers may use the engine
            turn.take(context, row, seconds)

    @plain_tensors()
    def compute_anew(self, session: Session, rotation: int) -> None:
        """Compute a conversation's stored tokens again, rotated for another length, for a caller who runs the passes himself."""
        _require_repeatable(session, "it has to be computed again")
        session.stats.count("computed_anew")
        session.begin_anew()
        session.rotation = rotation
        end = len(session.tokens)
        for start in range(0, end, self.chunk_tokens):
            piece = session.tokens[start : start + self.chunk_tokens]
            positions = torch.arange(start, start + len(piece), device=self.model.device)
            session.enter(Phase.PREFILL)
            context = ForwardContext(
                session,
                Phase.PREFILL,
                piece,
                positions,
                stored_after=start + len(piece),
                rotation=rotation,
                final=start + len(piece) == end,
            )
            self.model.forward(ForwardBatch([context]))
            self.after_pass([context])

    @plain_tensors()
    def after_pass(self, contexts: Sequence[ForwardContext]) -> None:
        """Complete a pass that the caller has run himself, and run the observations that compressors ask for."""
        for context in contexts:
            waiting = deque(ask_compressors(context))
            while waiting:
                _require_repeatable(context.session, "a policy asks for rows of it once more")
                observing = observation_context(context.session, *waiting.popleft(), self.model)
                self.model.forward(ForwardBatch([observing]))
                waiting.extend(ask_compressors(observing))
            context.session.enter(context.phase)
            context.session.look_for_references()

    def finish(self, turn: Turn, progress: Progress | None = None) -> Iterator[int]:
        """Run a turn to its end and yield its tokens. It is taken back if the consumer leaves before its last token.

        progress: called before each pass of the prefill.
        """
        given = 0
        total = turn.waiting
        _streams.add(turn)
        try:
            while True:
                if turn.error is not None:
                    raise turn.error
                while given < len(turn.output):
                    given += 1
                    yield turn.output[given - 1]
                if turn.finished:
                    break
                if progress is not None and turn.waiting:
                    progress(total - turn.waiting, total)
                self.run_pass([turn])
        finally:
            if turn.finished and turn.error is None and given < len(turn.output):
                turn.take_back()
            turn.close()
            turn.error = None  # its traceback would keep the session's store alive

    def _own(self, session: Session) -> None:
        if session.slots is not self.slots and not any(session.slots is each for each, _ in self._others.values()):
            raise InputError("this session belongs to another engine: open one with this engine's session()")


@atexit.register
def _end_streams() -> None:
    """Take back the turns of streams that the program leaves open. Their generators end when torch is gone already."""
    for turn in list(_streams):
        turn.close()


def _require_repeatable(session: Session, why: str) -> None:
    if not session.repeatable:
        raise ModelError(
            f"this conversation holds images or sound, which its tokens do not show, and {why}: choose a stack whose policies "
            "need no observation (full, snapkv), or give text only"
        )
