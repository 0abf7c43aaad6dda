"""Check every call of a policy. Turn a fault into a named error, or let the turn be finished dense.

Depends on policies and time, not on sessions. The session disables a policy, and the engine repairs damaged pairs.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from torch import Tensor

from loopserve.core.errors import (
    POLICY_TIMEOUT_S,
    ConfigError,
    Fault,
    OnPolicyFault,
    PolicyChecks,
    PolicyError,
    PolicyFault,
)
from loopserve.core.guard.faults import FAULTS, Owners, Policy, kind_of, policy_fault
from loopserve.core.guard.strict_checks import Inspection
from loopserve.core.policy.interfaces import AttentionInputs
from loopserve.core.policy.patterns import AttentionPattern

BREAKER_FAULTS = 3  # a policy with this many faults in one engine within
BREAKER_WINDOW_S = 60.0  # this many seconds is disabled
COOL_DOWN_S = 60.0  # for this many seconds

_log = logging.getLogger("loopserve")

Arguments = ParamSpec("Arguments")
Answer = TypeVar("Answer")


class Guard:
    """Check the policies of one engine. Policies are compared by identity, since the same object serves all sessions."""

    def __init__(
        self,
        *,
        checks: PolicyChecks | str = PolicyChecks.CHEAP,
        on_fault: OnPolicyFault | str = OnPolicyFault.RAISE,
        timeout_s: float | None = POLICY_TIMEOUT_S,
        owners: Owners | None = None,
        clock: Callable[[], float] = time.perf_counter,
        worked: Callable[[], float] = time.thread_time,
    ) -> None:
        """Set the limits of a guard. Raises ConfigError for unknown values.

        timeout_s: longest allowed call, in seconds of this thread's processor time (None = no limit). owners: the distribution of
        each policy class. clock: seconds, to count faults within a time window. worked: seconds of processor time of the calling
        thread.
        """
        try:
            self.strict = PolicyChecks(checks) is PolicyChecks.STRICT
            self.raises = OnPolicyFault(on_fault) is OnPolicyFault.RAISE
        except ValueError as error:
            known = f"policy_checks: {', '.join(PolicyChecks)}; on_policy_fault: {', '.join(OnPolicyFault)}"
            raise ConfigError(f"{error} ({known})") from error
        if timeout_s is not None and not timeout_s > 0:
            raise ConfigError(f"policy_timeout_s must be above 0, got {timeout_s}; None = no limit")
        self.owners = owners or {}
        self._timeout_s = float("inf") if timeout_s is None else timeout_s
        self._clock = clock
        self._worked = worked  # not the time of day: a paused or busy machine is no fault of a policy
        self._called: set[str] = set()  # the first call of each method is not timed, since kernels are compiled then
        self._recent: dict[int, deque[float]] = {}
        self._closed_until: dict[int, float] = {}

    def ask(
        self, policy: Policy, method: Callable[Arguments, Answer], *args: Arguments.args, **options: Arguments.kwargs
    ) -> Answer:
        """Return the result of a policy's method.

        Raises PolicyError for misconduct during the call: a write into its inputs, or a call that takes too long. Under strict
        checks also for process switches that are still changed, and for the faults that ``guard.strict_checks`` finds.
        """
        inputs = args[0] if args and type(args[0]) is AttentionInputs else None
        started = self._worked()
        answer = self._watched(policy, inputs, method, args, options)
        spent = self._worked() - started
        name = method.__qualname__
        if spent > self._timeout_s and name in self._called:
            raise PolicyError(
                f"it took {spent:.1f} s of processor time, the limit is {self._timeout_s:g} s", Fault.SLOW
            )
        self._called.add(name)
        return answer

    def attend(
        self, policy: Policy, pattern: AttentionPattern, inputs: AttentionInputs, need_lse: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Return the attention output of a policy's pattern. Not timed, since attention over a long history takes long."""
        options = {
            "scaling": inputs.scaling,
            "softcap": inputs.softcap,
            "first_valid": inputs.first_valid,
            "need_lse": need_lse,
        }
        return self._watched(policy, inputs, pattern.attend, (inputs.queries, inputs.keys, inputs.values), options)

    def _watched(
        self,
        policy: Policy,
        inputs: AttentionInputs | None,
        method: Callable[..., Answer],
        args: tuple[Any, ...],
        options: dict[str, Any],
    ) -> Answer:
        inspection = Inspection(policy, inputs) if self.strict else None
        written = _versions(inputs)
        try:
            answer = method(*args, **options)
        except FAULTS:
            _look(inputs, written, inspection)  # damage is reported before the exception that the call raised
            raise
        if inspection is not None or _versions(inputs) != written:
            _look(inputs, written, inspection)
        return answer

    def note(
        self, policy: Policy, error: BaseException, *, moment: str, layer: int | None = None, phase: str | None = None
    ) -> PolicyFault:
        """Return the fault with its origin. If faults are not raised, log it, and disable the policy after the third one in a
        minute.
        """
        fault = policy_fault(policy, error, moment=moment, owners=self.owners, layer=layer, phase=phase)
        if self.raises:
            return fault
        _log.warning("%s. The turn is finished with dense attention", fault)
        now = self._clock()
        recent = self._recent.setdefault(id(policy), deque(maxlen=BREAKER_FAULTS))
        recent.append(now)
        if len(recent) == BREAKER_FAULTS and now - recent[0] <= BREAKER_WINDOW_S and not self.skips(policy):
            self._closed_until[id(policy)] = now + COOL_DOWN_S
            recent.clear()
            _log.warning(
                "%s policy %r had %d faults within %g s: turns that begin in the next %g s are served without it, dense",
                kind_of(policy),
                policy.name,
                BREAKER_FAULTS,
                BREAKER_WINDOW_S,
                COOL_DOWN_S,
            )
        return fault

    def skips(self, policy: Policy) -> bool:
        """Return whether a turn that begins now runs without a policy, because of its faults in other turns."""
        return bool(self._closed_until) and self._clock() < self._closed_until.get(id(policy), 0.0)


def _versions(inputs: AttentionInputs | None) -> tuple[int, ...]:
    """Return the write counters of a call's inputs. Does the same as ``buffers.versions``, but faster."""
    if inputs is None:
        return ()
    try:
        return (
            inputs.queries._version,
            inputs.keys._version,
            inputs.values._version,
            inputs.columns._version,
            inputs.positions._version,
        )
    except RuntimeError:  # the tensor was made in inference mode
        return ()


def _look(inputs: AttentionInputs | None, written: tuple[int, ...], inspection: Inspection | None) -> None:
    """Raise PolicyError for side effects of a call."""
    if _versions(inputs) != written or (inspection is not None and inspection.wrote):
        raise PolicyError("it wrote into its inputs", Fault.WROTE)
    if inspection is not None:
        inspection.conclude()
