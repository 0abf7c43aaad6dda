"""Build the error of a policy's fault: policy, distribution, call, what it did, what to do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from pydantic import ValidationError
from pydantic_core import PydanticCustomError

from loopserve.core.errors import Fault, LoopServeError, PolicyError, PolicyFault
from loopserve.core.policy.interfaces import DecodeCompressor, PrefillSparsifier

Policy = PrefillSparsifier | DecodeCompressor[Any]
Owners = Mapping[type, str]  # by policy class, its distribution and version

FAULTS = (Exception, SystemExit)  # exceptions that count as a policy's fault; KeyboardInterrupt is the user's

_UNKNOWN = "registered by no plugin"
_REMEDIES = {
    Fault.SLOW: "choose another policy, or give it more time (policy_timeout_s)",
    Fault.WROTE: "it must copy what it wants to change; the conversation is computed anew from its tokens",
    Fault.KEPT: "it must copy what it wants to keep",
    Fault.HIDDEN: "what changes belongs into the state that the session hands it",
    Fault.BUDGET: "it must keep to its budget, or say another one in most_pairs",
}
_REMEDY = "choose another policy or tell its author"


def kind_of(policy: Policy) -> str:
    return "prefill" if isinstance(policy, PrefillSparsifier) else "decode"


def chain(policy: Policy) -> list[Policy]:
    """Return a policy and the policies that it wraps, outermost first."""
    policies = [policy]
    while isinstance(inner := getattr(policies[-1].config, "inner", None), PrefillSparsifier | DecodeCompressor):
        policies.append(inner)
    return policies


def policy_fault(
    policy: Policy,
    error: BaseException,
    *,
    moment: str,
    owners: Owners,
    layer: int | None = None,
    phase: str | None = None,
) -> PolicyFault:
    """Return the PolicyFault for an error raised in or about a policy's call."""
    ours = isinstance(error, PolicyError)
    fault = error.fault if isinstance(error, PolicyError) else Fault.RAISED
    links = chain(policy)
    owned = [owners.get(type(each), _UNKNOWN) for each in links]
    description = " around ".join(f"{each.name!r} ({owner})" for each, owner in zip(links, owned, strict=True))
    where = moment if layer is None else f"{moment} of layer {layer}"
    where += f" ({phase})" if phase is not None else ""
    did = " ".join(str(error).split()) if ours else _raised(error)
    return PolicyFault(
        f"{kind_of(policy)} policy {description}, {where}: {did}; {_REMEDIES.get(fault, _REMEDY)}",
        fault,
        policy=policy.name,
        distribution=owned[-1],
        moment=moment,
        layer=layer,
        phase=phase,
    )


@contextmanager
def blamed(policy: Policy, moment: str, owners: Owners, layer: int | None = None) -> Iterator[None]:
    """Turn an exception of a policy in this block, while a stack is loaded, into a PolicyFault. Errors of loopserve pass unchanged."""
    try:
        yield
    except LoopServeError:
        raise
    except FAULTS as error:
        raise policy_fault(policy, error, moment=moment, owners=owners, layer=layer) from error


@contextmanager
def constructing(kind: str, name: str, distribution: str) -> Iterator[None]:
    """Turn an exception of a policy's constructor or options in this block into a PolicyFault.

    Errors about the user's input pass unchanged: those of loopserve and of pydantic.
    """
    try:
        yield
    except (LoopServeError, ValidationError, PydanticCustomError):
        raise
    except FAULTS as error:
        raise PolicyFault(
            f"{kind} policy {name!r} ({distribution}), its constructor: {_raised(error)}; {_REMEDY}",
            Fault.RAISED,
            policy=name,
            distribution=distribution,
            moment="constructor",
        ) from error


def _raised(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"it raised {f'{type(error).__name__}: {text}'.rstrip(': ')}"
