"""One family of errors. Each message says where, what, what is known and what to do; the command line shows no traceback for them."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from difflib import get_close_matches
from enum import StrEnum

POLICY_TIMEOUT_S = 5.0  # a longer call of a policy is a fault


class PolicyChecks(StrEnum):
    """How closely an engine looks at what its policies do."""

    CHEAP = "cheap"  # what costs next to nothing beside a decode step
    STRICT = "strict"  # everything that can be seen from outside; slow, for trying a policy out


class OnPolicyFault(StrEnum):
    """What an engine does about a policy that breaks its contract."""

    RAISE = "raise"  # a PolicyFault; the turn is taken back
    DENSE = "dense"  # the turn is finished dense, and the fault counted in its figures


class LoopServeError(Exception):
    """Everything loopserve raises on purpose. ``exit_code`` is what the command line ends with."""

    exit_code = 1


class ConfigError(LoopServeError):
    """A stack, a policy option or a command-line value is wrong."""

    exit_code = 2


class InputError(LoopServeError):
    """What a user sent cannot be answered (empty, too long); the session stays at its last complete turn."""

    exit_code = 2


class CapacityError(LoopServeError):
    """So many turns wait already that another one is not taken; trying again later may help."""


class CancelledTurn(LoopServeError):
    """A turn was cancelled by its owner and taken back."""


class ModelError(LoopServeError):
    """A model cannot be loaded, or asks attention for something loopserve does not do."""


class Fault(StrEnum):
    """How a policy broke its contract."""

    RAISED = "raised"  # an exception of its own
    ANSWER = "answer"  # an answer of the wrong type, shape, dtype, device, order or range
    BUDGET = "budget"  # more pairs than its own budget
    NAN = "nan"  # scores or an output that are not numbers
    WROTE = "wrote"  # into what it was only given to read
    KEPT = "kept"  # a reference to a session's store, beyond the pass
    HIDDEN = "hidden"  # state outside the session, or a switch of the whole process
    SLOW = "slow"  # longer than the limit


class PolicyError(LoopServeError):
    """A policy broke its contract (indices out of range, wrong shape); ``fault`` says how."""

    def __init__(self, message: str, fault: Fault = Fault.ANSWER) -> None:
        super().__init__(message)
        self.fault = fault


class PolicyFault(PolicyError):
    """A fault with its address: which policy of which distribution, in which call, in which layer and phase."""

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
        """The session's stored pairs can no longer be trusted; they are computed anew from its tokens."""
        return self.fault is Fault.WROTE


class PluginError(LoopServeError):
    """A plugin cannot be loaded, or claims a name that is taken."""


class CacheError(LoopServeError):
    """An operation on the KV cache that would lose or corrupt a conversation."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """``; did you mean 'x'? (known: x, y)``, or only the known names when none is close; letters that only look alike are named."""
    names = sorted(known)
    close = get_close_matches(name, names, n=1, cutoff=0.6)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    letters = foreign_letters(name, "".join(names))
    return f"{f', which holds {letters}' if letters else ''}{hint} (known: {', '.join(names) or 'none'})"


def foreign_letters(text: str, usual: str = "") -> str:
    """The characters of a text that are neither ASCII nor among the usual ones, with code point and name; empty if there are none.

    Such a character may look like a letter of the alphabet, or like nothing at all.
    """
    found = [
        each for each in dict.fromkeys(text) if (not each.isascii() or not each.isprintable()) and each not in usual
    ]
    spoken = [f"{_seen(each)}U+{ord(each):04X} {unicodedata.name(each, 'a control character')}" for each in found[:3]]
    return ", ".join(spoken) + (f" and {len(found) - 3} more" if len(found) > 3 else "")


def _seen(character: str) -> str:
    return f"{character!r} " if character.isprintable() else ""
