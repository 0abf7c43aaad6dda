"""Define the exceptions of loopserve. Each message says where, what, what is known and what to do.

The command line prints the message without a traceback.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from difflib import get_close_matches
from enum import StrEnum

POLICY_TIMEOUT_S = 5.0  # a policy call that takes longer is a fault


class PolicyChecks(StrEnum):
    """Name how strictly an engine checks its policies."""

    CHEAP = "cheap"  # checks that are fast compared with a decode step
    STRICT = "strict"  # every check that is possible from outside; slow, for developing a policy


class OnPolicyFault(StrEnum):
    """Name the reaction of an engine to a policy that breaks its contract."""

    RAISE = "raise"  # raise a PolicyFault; the turn is rolled back
    DENSE = "dense"  # finish the turn dense and count the fault in its figures


class LoopServeError(Exception):
    """Serve as base of all errors that loopserve raises on purpose. ``exit_code`` is the exit status of the command line."""

    exit_code = 1


class ConfigError(LoopServeError):
    """Report a wrong stack, policy option or command-line value."""

    exit_code = 2


class InputError(LoopServeError):
    """Report an input that cannot be answered (empty, too long). The session stays at its last complete turn."""

    exit_code = 2


class CapacityError(LoopServeError):
    """Report that too many turns are waiting already. A later attempt may succeed."""


class CancelledTurn(LoopServeError):
    """Report that the owner of a turn cancelled it and that it was rolled back."""


class ModelError(LoopServeError):
    """Report a model that cannot be loaded, or that needs an attention feature which loopserve does not support."""


class Fault(StrEnum):
    """Name how a policy broke its contract."""

    RAISED = "raised"  # it raised an exception of its own
    ANSWER = "answer"  # it returned a value of the wrong type, shape, dtype, device, order or range
    BUDGET = "budget"  # it selected more pairs than its own budget
    NAN = "nan"  # it returned scores or an output that contain NaN
    WROTE = "wrote"  # it wrote into an input, which is read-only
    KEPT = "kept"  # it kept a reference to a session's store beyond the pass
    HIDDEN = "hidden"  # it kept state outside the session, or changed a switch of the whole process
    SLOW = "slow"  # it took longer than the limit


class PolicyError(LoopServeError):
    """Report that a policy broke its contract (indices out of range, wrong shape). ``fault`` names the kind."""

    def __init__(self, message: str, fault: Fault = Fault.ANSWER) -> None:
        super().__init__(message)
        self.fault = fault


class PolicyFault(PolicyError):
    """Report a fault with its origin: policy, distribution, call, layer and phase."""

    def __init__(
        self,
        message: str,
        fault: Fault,
        *,
        policy: str,
        distribution: str,
        moment: str,
        layer: int | None = None,
        phase: str | None = None,
    ) -> None:
        super().__init__(message, fault)
        self.policy = policy
        self.distribution = distribution
        self.moment = moment
        self.layer = layer
        self.phase = phase

    @property
    def damaged(self) -> bool:
        """Return whether the session's stored pairs may be corrupt. They are computed again from its tokens."""
        return self.fault is Fault.WROTE


class PluginError(LoopServeError):
    """Report a plugin that cannot be loaded, or that registers a name which is taken."""


class CacheError(LoopServeError):
    """Report an operation on the KV cache that would lose or corrupt a conversation."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ``; did you mean 'x'? (known: x, y)``, or only the known names when none is close. Name letters that only look alike."""
    names = sorted(known)
    close = get_close_matches(name, names, n=1, cutoff=0.6)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    letters = foreign_letters(name, "".join(names))
    return f"{f', which holds {letters}' if letters else ''}{hint} (known: {', '.join(names) or 'none'})"


def foreign_letters(text: str, usual: str = "") -> str:
    """Return the characters of a text that are neither ASCII nor among the usual ones, with code point and name, or "" if none.

    Such a character may look like a letter of the alphabet, or be invisible.
    """
    found = [
        each for each in dict.fromkeys(text) if (not each.isascii() or not each.isprintable()) and each not in usual
    ]
    spoken = [f"{_seen(each)}U+{ord(each):04X} {unicodedata.name(each, 'a control character')}" for each in found[:3]]
    return ", ".join(spoken) + (f" and {len(found) - 3} more" if len(found) > 3 else "")


def _seen(character: str) -> str:
    return f"{character!r} " if character.isprintable() else ""
