"""Check every call of a policy and its result. Turn a fault into a named error, or let the turn be finished dense.

Depends on policies and time, not on sessions. The session disables a policy, and the engine repairs damaged pairs.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
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
from loopserve.core.kv.layer_cache import LayerCache
from loopserve.core.kv.selection import KVSelection, Retention
from loopserve.core.policy.interfaces import AttentionInputs, Observation
from loopserve.core.policy.patterns import AttentionPattern, BlockPattern, DensePattern, LinePattern, RowGroups

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
        inputs = args[0] if args and type(args[0]) is AttentionInputs else None  # others are no views of the store
        started = self._worked()
        answer = self._watched(policy, inputs, method, args, options)
        spent = self._worked() - started
        name = method.__qualname__
        if spent > self._timeout_s and name in self._called:
            raise PolicyError(
                f"it took {spent:.1f} s of processor time, the limit is {self._timeout_s:g} s", Fault.SLOW
            )
        if name not in self._called:
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
        args = (inputs.queries, *inputs.rows_for(pattern))
        return self._watched(policy, _stored(inputs), pattern.attend, args, options)

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


def _stored(inputs: object) -> AttentionInputs | None:
    """Return the inputs of a call that are tensors of the store, which a policy could write into."""
    return inputs if type(inputs) is AttentionInputs else None


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


_OURS = (DensePattern, LinePattern, BlockPattern, RowGroups)  # their kernels are part of loopserve
_ROWS_LOOKED_AT = 8


def check_selection(
    selection: KVSelection, cache: LayerCache, retention: Retention, most: int | None, outputs: int
) -> None:
    """Check a selection for one layer before it is passed to the cache. Raises PolicyError.

    most: pairs per KV head that the policy may make attended. outputs: tokens of this answer, which are attended in addition.
    """
    if not isinstance(selection, KVSelection):
        raise PolicyError(f"a selection must be a KVSelection, got {type(selection).__name__}")
    if selection.retention is not retention:
        raise PolicyError(f"a selection says {selection.retention}, the policy declares {retention}")
    if type(selection.boundary) is not int:
        raise PolicyError(f"KVSelection.boundary: expected an int, got {type(selection.boundary).__name__}")
    assert cache.store is not None
    heads, device = cache.store.heads, cache.store.device
    for name in ("indices", "lengths"):
        tensor = getattr(selection, name)
        if not isinstance(tensor, Tensor) or tensor.dtype != torch.long:
            got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise PolicyError(f"KVSelection.{name}: expected int64, got {got}")
        if tensor.device != device:
            raise PolicyError(f"KVSelection.{name}: is on {tensor.device}, the store is on {device}")
    selection.check_form(heads, cache.seen)
    check_budget(selection, cache, most, outputs)


def check_budget(selection: KVSelection, cache: LayerCache, most: int | None, outputs: int) -> None:
    """Raise PolicyError if a selection makes more pairs attended than the policy may. Arguments: see ``check_selection``."""
    if most is None:
        return
    assert cache.store is not None
    heads = cache.store.heads
    chosen = selection.pairs if selection.ragged else heads * selection.indices.shape[1]
    attended = chosen + heads * (cache.seen - selection.boundary - outputs)
    if chosen > heads * most or attended > heads * most:
        raise PolicyError(
            f"a selection makes {max(chosen, attended) / heads:.0f} pairs per KV head attended beside this answer's "
            f"outputs, the budget is {most}",
            Fault.BUDGET,
        )


def check_observation(observation: Observation, start: int, length: int) -> None:
    """Check the rows to compute again: sorted positions from ``start`` on. Raises PolicyError."""
    rows = observation.positions
    if not isinstance(rows, Tensor) or rows.dtype != torch.long or rows.dim() != 1 or not len(rows):
        actual = f"{rows.dtype} {list(rows.shape)}" if isinstance(rows, Tensor) else type(rows).__name__
        raise PolicyError(f"Observation.positions: expected int64 [r], got {actual}")
    prompt = observation.prompt
    if type(prompt) is not tuple or not all(type(token) is int and token >= 0 for token in prompt):
        raise PolicyError(f"Observation.prompt: expected a tuple of token ids, got {prompt!r}")
    if rows.device.type == "meta":
        raise PolicyError("Observation.positions: hold no numbers, they are on the device meta")
    first, last = int(rows[0]), int(rows[-1])
    if first < start or last >= length or bool((rows[1:] <= rows[:-1]).any()):
        within = "what is left to read again" if observation.again else "this turn"
        raise PolicyError(
            f"Observation.positions: must rise within {within}, [{start}, {length}), got {first} to {last}"
        )


def check_pattern(pattern: AttentionPattern, inputs: AttentionInputs) -> None:
    """Check a pattern for the new rows of one layer. Raises PolicyError.

    Under strict checks also check that it is causal and that each row sees itself.
    """
    if not isinstance(pattern, AttentionPattern):
        raise PolicyError(f"sparsify must return an AttentionPattern, got {type(pattern).__name__}")
    wanted = (inputs.queries.shape[0], inputs.new_tokens, inputs.total_tokens)
    if tuple(pattern.size) != wanted:
        raise PolicyError(f"the pattern is for (heads, new tokens, tokens) {tuple(pattern.size)}, wanted is {wanted}")
    parts = pattern.parts if isinstance(pattern, RowGroups) else (pattern,)
    for part in parts:
        for name, value in getattr(part, "__dict__", {}).items():
            if isinstance(value, Tensor) and value.device != inputs.queries.device:
                raise PolicyError(
                    f"{type(part).__name__}.{name} is on {value.device}, the queries on {inputs.queries.device}"
                )
    if inputs.strict:
        _check_cells(pattern, inputs)


def _check_cells(pattern: AttentionPattern, inputs: AttentionInputs) -> None:
    """Check a few rows of the pattern, cell by cell."""
    chosen = torch.linspace(
        0, inputs.new_tokens - 1, min(inputs.new_tokens, _ROWS_LOOKED_AT), dtype=torch.float32, device="cpu"
    ).long()
    columns = inputs.columns[chosen.to(inputs.columns.device)]
    cells = pattern.rows(columns)
    wanted = (inputs.queries.shape[0], len(columns), inputs.total_tokens)
    if cells.shape != wanted or cells.dtype != torch.bool:
        raise PolicyError(f"the pattern's rows are {cells.dtype} {list(cells.shape)}, wanted is bool {list(wanted)}")
    later = torch.arange(inputs.total_tokens, device=cells.device) > columns[:, None].to(cells.device)
    if bool((cells & later).any()):
        raise PolicyError("the pattern is not causal: a query attends to a later key")
    own = columns.to(cells.device).expand(len(cells), -1)[..., None]
    if not bool(cells.gather(2, own).all()):
        raise PolicyError("the pattern leaves a query without its own key")


def check_output(
    pattern: AttentionPattern, result: tuple[Tensor, Tensor | None], inputs: AttentionInputs, need_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """Check the attention output of a pattern. Raises PolicyError.

    NaN is searched for if the kernel is not one of loopserve. On an accelerator this is done under strict checks only, since the
    search waits for the device.
    """
    if not isinstance(result, tuple) or len(result) != 2:
        raise PolicyError(f"attend must return (output, log-sum-exp or None), got {type(result).__name__}")
    output, lse = result
    queries = inputs.queries
    wanted = {
        "output": (*queries.shape[:2], inputs.rows_for(pattern)[1].shape[2]),
        "log-sum-exp": tuple(queries.shape[:2]),
    }
    for name, tensor, dtype in (("output", output, queries.dtype), ("log-sum-exp", lse, torch.float32)):
        if tensor is None and name == "log-sum-exp" and not need_lse:
            continue
        if not isinstance(tensor, Tensor):
            raise PolicyError(f"attend's {name} must be a tensor, got {type(tensor).__name__}")
        if tuple(tensor.shape) != wanted[name] or tensor.dtype != dtype or tensor.device != queries.device:
            raise PolicyError(
                f"attend's {name} is {tensor.dtype} {list(tensor.shape)} on {tensor.device}, "
                f"wanted is {dtype} {list(wanted[name])} on {queries.device}"
            )
    looks = inputs.strict or (type(pattern) not in _OURS and queries.device.type == "cpu")
    if looks and bool(output.isnan().any()):
        raise PolicyError("attend's output holds NaN", Fault.NAN)
    return output, lse
