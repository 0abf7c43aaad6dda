"""Run the turns of sessions through one model under one stack. Knows tokens, no text."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

from loopserve.core.engine.forward import ForwardBatch, ForwardContext, Model
from loopserve.core.engine.sampling import Sampler, SamplingConfig
from loopserve.core.engine.session import UNDO_DEPTH, Session
from loopserve.core.engine.slots import Slots
from loopserve.core.engine.turn import Choose, Turn, complete, observation_context
from loopserve.core.errors import POLICY_TIMEOUT_S, ConfigError, InputError, OnPolicyFault, PolicyChecks
from loopserve.core.guard.guard import Guard
from loopserve.core.stack.stack import PolicyStack

CHUNK_TOKENS = 4096

Progress = Callable[[int, int], None]  # prompt tokens computed so far, and of the whole turn


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
    ) -> None:
        """chunk_tokens: longest piece of a prefill. measure_coverage: realised coverage over all rows, for reports.
        policy_checks, on_policy_fault, policy_timeout_s: how policies are checked, see ``core.guard``. undo_depth: turns that can
        be taken back without computing the conversation anew. ConfigError for what the stack or the values do not allow.
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
        self.guard = Guard(
            checks=policy_checks, on_fault=on_policy_fault, timeout_s=policy_timeout_s, owners=stack.owners
        )
        self.slots = Slots(model.layers, stack)
        self._lock = threading.Lock()

    def session(self) -> Session:
        """Open a conversation."""
        return Session(self.slots, self.guard, self.undo_depth)

    def generate(
        self,
        session: Session,
        new_tokens: Sequence[int],
        sampling: SamplingConfig | Choose,
        stop_ids: frozenset[int] = frozenset(),
        max_new_tokens: int | None = None,
        *,
        progress: Progress | None = None,
    ) -> Iterator[int]:
        """Answer one turn, token by token, the stop token included.

        sampling: settings, or a function from logits ``[vocabulary]`` to a token. max_new_tokens: those of the settings unless
        given. progress: called before each pass of the prefill. A turn that is not finished (an error, Ctrl-C, a consumer that
        walks away) is taken back whole.
        """
        choose, most = _chooser(sampling, max_new_tokens)
        turn = self.begin(session, new_tokens, choose, stop_ids=stop_ids, max_new_tokens=most)
        yield from self._finish(turn, progress)

    def prefill(self, session: Session, new_tokens: Sequence[int], *, max_new_tokens: int = 0) -> Tensor:
        """Begin a turn and compute its tokens; return the logits ``[vocabulary]`` of the answer's first token.

        max_new_tokens: tokens that the answer may have. The session rests afterwards: it can be forked, and the turn answered
        twice.
        """
        turn = self.begin(session, new_tokens, None, max_new_tokens=max_new_tokens)
        for _ in self._finish(turn):
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
    ) -> Iterator[int]:
        """Answer the turn that ``prefill`` gave these logits for, token by token; left unfinished, the turn is taken back whole."""
        choose, most = _chooser(sampling, max_new_tokens)
        self._own(session)
        session.require_rest()
        turn = Turn(
            session,
            None,
            choose,
            device=self.model.device,
            logits=logits,
            stop_ids=stop_ids,
            max_new_tokens=most,
            chunk_tokens=self.chunk_tokens,
            measure=self.measure_coverage,
        )
        yield from self._finish(turn)

    def begin(
        self,
        session: Session,
        new_tokens: Sequence[int],
        choose: Choose | None,
        *,
        stop_ids: frozenset[int] = frozenset(),
        max_new_tokens: int = 0,
    ) -> Turn:
        """Begin a turn; nothing is computed before ``run``. Raises InputError for a turn that does not fit the model."""
        self._own(session)
        session.require_rest()
        self._check_length(session, new_tokens, max_new_tokens)
        return Turn(
            session,
            new_tokens,
            choose,
            device=self.model.device,
            stop_ids=stop_ids,
            max_new_tokens=max_new_tokens,
            chunk_tokens=self.chunk_tokens,
            measure=self.measure_coverage,
        )

    def run(self, turns: Sequence[Turn], max_prefill_tokens: int | None = None) -> None:
        """Run one forward pass with what each of these turns needs next; ``error`` of a turn says what ended it.

        max_prefill_tokens: tokens of prefill in the pass, given to the turns in their order; a turn that gets none is left out.
        """
        with self._lock:
            pieces = _pieces(turns, max_prefill_tokens)
            contexts = [turn.step(size) for turn, size in pieces]
            if not contexts:
                return
            started = time.perf_counter()
            try:
                logits: Sequence[Tensor | None] = list(self.model.forward(ForwardBatch(contexts)))
            except Exception as error:
                for context in contexts:  # an error of the pass as a whole ends every turn in it
                    context.error = context.error or error
                logits = [None] * len(contexts)
            seconds = time.perf_counter() - started
            for (turn, _), context, row in zip(pieces, contexts, logits, strict=True):
                turn.take(context, row, seconds)

    def complete(self, contexts: Sequence[ForwardContext]) -> None:
        """Complete a pass that the caller has run himself, and run the observations that compressors ask for."""
        for context in contexts:
            waiting = deque(complete(context))
            while waiting:
                observing = observation_context(context.session, *waiting.popleft(), self.model.device)
                self.model.forward(ForwardBatch([observing]))
                waiting.extend(complete(observing))
            context.session.enter(context.phase)
            context.session.look_for_references()

    def _finish(self, turn: Turn, progress: Progress | None = None) -> Iterator[int]:
        """Run a turn to its end and yield its tokens. It is taken back unless its last token was taken by the consumer."""
        given, done = 0, False
        total = turn.waiting
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
                self.run([turn])
            done = True
        finally:
            if turn.finished and turn.error is None and not done:
                turn.session.undo()
            turn.close()
            turn.error = None  # its traceback would keep the session's store alive

    def _own(self, session: Session) -> None:
        if session.slots is not self.slots:
            raise InputError("this session belongs to another engine: open one with this engine's session()")

    def _check_length(self, session: Session, new_tokens: Sequence[int], max_new_tokens: int) -> None:
        if not new_tokens:
            raise InputError("a turn needs at least one token")
        limit = self.model.max_positions
        needed = len(session.tokens) + len(new_tokens) + 1
        if limit is not None and needed > limit:
            raise InputError(
                f"the conversation would be {needed} tokens long, the model takes {limit}: shorten the message, "
                "undo a turn, or start a new session"
            )
        if limit is not None and needed - 1 + max_new_tokens > limit:
            raise InputError(
                f"max_new_tokens={max_new_tokens} does not fit: {limit - needed + 1} tokens are left of the model's {limit}"
            )


def _chooser(sampling: SamplingConfig | Choose, max_new_tokens: int | None) -> tuple[Choose, int]:
    if isinstance(sampling, SamplingConfig):
        return Sampler(sampling), max_new_tokens or sampling.max_new_tokens
    if max_new_tokens is None:
        raise InputError("max_new_tokens is needed beside a function that chooses the tokens")
    return sampling, max_new_tokens


def _pieces(turns: Sequence[Turn], max_prefill_tokens: int | None) -> list[tuple[Turn, int | None]]:
    """Return the turns of a pass, each with the prefill tokens it may take."""
    if max_prefill_tokens is None:
        return [(turn, None) for turn in turns]
    found: list[tuple[Turn, int | None]] = []
    left = max_prefill_tokens
    for turn in turns:
        if turn.waiting == 0:
            found.append((turn, None))
        elif left > 0:
            found.append((turn, left))
            left -= min(left, turn.waiting)
    return found
