"""Hold a policy under test, its variants under other options, the form of a check, and the ways a check can end.

Variants are small enough for a few dozen tokens, evicting, or as wide as possible. The options' types, bounds and usual
names determine the changes, so that unknown policies can be tested as well.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum, StrEnum
from functools import cached_property
from typing import Any, get_args

import torch
from pydantic import ValidationError
from pydantic.fields import FieldInfo
from torch import Tensor

from loopserve.core.errors import ConfigError, LoopServeError
from loopserve.core.kv.selection import Retention
from loopserve.core.policy.base import PolicyConfig
from loopserve.core.policy.interfaces import DecodeCompressor, PrefillSparsifier
from loopserve.policies.decode.snapkv import SnapKVDecode
from loopserve.testing.inputs import make_inputs

AnyPolicy = PrefillSparsifier | DecodeCompressor[Any]
AnyPolicyClass = type[PrefillSparsifier] | type[DecodeCompressor[Any]]

WIDE = 4096  # more tokens than any conversation of the kit has
_LARGE, _MIDDLING = 512, 16
_SPARSE = 0.9  # share of the causal cells below which a pattern counts as sparse
_WIDTHS = ("budget", "window", "_size", "last_rows")  # suffixes of options that set a number of tokens
STEPS = (("prefill", 50), ("decode", 10), ("prefill", 1), ("decode", 4), ("prefill", 40), ("decode", 10))


def small(policy: AnyPolicyClass) -> AnyPolicy:
    """Return a policy of this class that is active on a few dozen tokens: budgets of about 24, windows of about 4.

    A sparsifier's options are reduced, and a share lowered or set to 1, until a turn of 48 tokens is sparse: most
    checks prove nothing on a dense pattern. Raises ConfigError if no object can be made.
    """
    first: AnyPolicy | None = None
    make = policy_maker(policy)
    for options in _smaller(policy):
        made = make(options)
        if made is not None and (not isinstance(made, PrefillSparsifier) or leaves_something_out(made)):
            return made
        first = first or made
    if first is None:
        raise ConfigError(
            f"{policy.__module__}.{policy.__qualname__} cannot be made without options of its own: "
            "give the check an object instead of the class"
        )
    return first


def policy_maker(policy: AnyPolicyClass) -> Callable[[dict[str, Any]], AnyPolicy | None]:
    """Return a function that makes a policy from options, or None where they are incompatible.

    Raises ConfigError for an error of the policy's own code.
    """

    def make(options: dict[str, Any]) -> AnyPolicy | None:
        try:
            return policy(policy.Config(**options))
        except ValidationError:
            return None
        except Exception as error:  # foreign constructor
            where = f"{policy.__module__}.{policy.__qualname__}"
            raise ConfigError(f"{where} cannot be made: {type(error).__name__}: {error}") from error

    return make


def _smaller(policy: AnyPolicyClass) -> Iterable[dict[str, Any]]:
    """Yield options to try, the least changed first; the defaults come last."""
    fields = policy.Config.model_fields
    inner: dict[str, Any] = {"inner": _example()} if "inner" in fields else {}
    shares = [name for name, field in fields.items() if isinstance(field.default, float) and _is_share(field)]
    # A threshold above which a policy falls back to dense counts as a share as well, and must be high.
    tried: list[dict[str, Any]] = [{}, *({name: share} for share in (0.5, 1.0) for name in shares)]
    for large, middling in ((42, 8), (170, 8), (680, 32)):
        widths = {
            name: max(field.default // (large if field.default >= _LARGE else middling), 1)
            for name, field in fields.items()
            if type(field.default) is int and field.default >= _MIDDLING
        }
        yield from (inner | widths | share for share in tried)
    yield inner


def _example() -> DecodeCompressor[Any]:
    return SnapKVDecode(SnapKVDecode.Config(budget=24, window=8, kernel=3, sink_tokens=2, recent_window=4))


def leaves_something_out(policy: PrefillSparsifier) -> bool:
    """Return whether a first turn of 48 tokens is sparse."""
    try:
        mask = policy.sparsify(make_inputs(new_tokens=48, total_tokens=48, structured=True)).to_mask()
    except Exception:  # the checks report the error
        return False
    return float(mask.sum()) < _SPARSE * len(mask) * 48 * 49 / 2


def changed(policy: AnyPolicy, **options: Any) -> AnyPolicy:
    """Return a policy of the same class with some options replaced. Raises ValidationError where they are incompatible."""
    kept = {name: getattr(policy.config, name) for name in type(policy.config).model_fields}
    return type(policy)(type(policy.config)(**{**kept, **options}))


def evicting(policy: DecodeCompressor[Any]) -> DecodeCompressor[Any] | None:
    """Return the policy with the one option changed that makes it evict; None if no option does."""
    if policy.retention is Retention.EVICT:
        return policy
    for name, options in _alternatives(policy.config):
        for option in options:
            try:
                other = changed(policy, **{name: option})
            except ValidationError:
                continue
            if isinstance(other, DecodeCompressor) and other.retention is Retention.EVICT:
                return other
    return None


def _alternatives(config: PolicyConfig) -> Iterable[tuple[str, list[Any]]]:
    for name in type(config).model_fields:
        value = getattr(config, name)
        if isinstance(value, Enum):
            yield name, [each for each in type(value) if each is not value]
        elif isinstance(value, DecodeCompressor):
            inner = evicting(value)
            yield name, [inner] if inner is not None else []


def widest(policy: AnyPolicy) -> AnyPolicy | None:
    """Return the policy with every share at 1 and every width beyond the conversation; None if it has no such option."""
    options: dict[str, Any] = {}
    for name, field in type(policy.config).model_fields.items():
        value = getattr(policy.config, name)
        if isinstance(value, float) and _is_share(field):
            options[name] = 1.0
        elif isinstance(value, int) and not isinstance(value, bool) and name.endswith(_WIDTHS):
            options[name] = WIDE
    if not options:
        return None
    try:
        return changed(policy, **options)
    except ValidationError:
        return None


def _is_share(field: FieldInfo) -> bool:
    """Return whether an option is a number from above 0 to 1 included; 0 being excluded separates it from weights and decays."""
    bounds = {name: getattr(each, name) for each in field.metadata for name in ("gt", "le") if hasattr(each, name)}
    return bounds == {"gt": 0, "le": 1} and float in (field.annotation, *get_args(field.annotation))


def budget_of(policy: DecodeCompressor[Any]) -> int | None:
    """Return the pairs per KV head that a compressor promises to attend to, mean over heads and layers.

    A compressor that sets no limit (``most_pairs``) promises none, whatever its options are called.
    """
    if policy.most_pairs is None:
        return None
    limits = getattr(policy, "limits", policy.config)
    found = getattr(limits, "budget", None)
    return found if isinstance(found, int) else None


def forced_of(policy: DecodeCompressor[Any], option: str) -> int:
    """Return how many tokens an option such as ``sink_tokens`` forces in; 0 where a policy has no such option."""
    limits = getattr(policy, "limits", policy.config)
    return int(getattr(limits, option, 0) or 0)


class NotApplicable(Exception):
    """Report that a check does not apply to this policy; the message says why."""


class NotConforming(LoopServeError, AssertionError):
    """Report that a policy breaks a promise of its contract."""


class Outcome(StrEnum):
    """Name how a check ends."""

    OK = "ok"
    FAILED = "failed"
    SKIPPED = "skipped"


class Subject:
    """Hold a policy under test. A class is tested under small options, an object as it is."""

    def __init__(self, policy: AnyPolicy | AnyPolicyClass | Subject) -> None:
        """Make the policy. Raises ConfigError for an object that is no policy, or a class that cannot be made."""
        if not __debug__:
            raise ConfigError("the checks are assertions, which `python -O` leaves out: run without -O")
        if isinstance(policy, Subject):
            self.policy: AnyPolicy = policy.policy
        elif inspect.isclass(policy) and issubclass(policy, PrefillSparsifier | DecodeCompressor):
            self.policy = small(policy)
        elif isinstance(policy, PrefillSparsifier | DecodeCompressor):
            self.policy = policy
        else:
            raise ConfigError(f"{policy!r} is no policy: give a class or an object of one")

    @property
    def kind(self) -> type[PrefillSparsifier] | type[DecodeCompressor[Any]]:
        return PrefillSparsifier if isinstance(self.policy, PrefillSparsifier) else DecodeCompressor

    @property
    def sparsifier(self) -> PrefillSparsifier:
        assert isinstance(self.policy, PrefillSparsifier)
        return self.policy

    @property
    def compressor(self) -> DecodeCompressor[Any]:
        assert isinstance(self.policy, DecodeCompressor)
        return self.policy

    @cached_property
    def steps(self) -> tuple[tuple[str, int], ...]:
        """Return a conversation of three turns, the first long enough for the budget to leave something out."""
        first = max(STEPS[0][1], 2 * (budget_of(self.compressor) or 0))
        return ((STEPS[0][0], first), *STEPS[1:])

    def script(self, seed: int = 0, layers: int = 2, tokens: int | None = None) -> tuple[Tensor, Tensor]:
        """Return queries ``[L, Hq, N, D]`` and keys ``[L, Hkv, N, D]`` of that conversation."""
        source = torch.Generator().manual_seed(seed)
        tokens = tokens or sum(count for _, count in self.steps) + 40
        queries = torch.randn(layers, 4, tokens, 16, generator=source, dtype=torch.float32, device="cpu")
        return queries, torch.randn(layers, 2, tokens, 16, generator=source, dtype=torch.float32, device="cpu")


@dataclass(frozen=True)
class Check:
    """Test one promise by one function, which raises NotApplicable or, for a broken promise, AssertionError."""

    function: Callable[[Subject], None]
    kind: type[PrefillSparsifier] | type[DecodeCompressor[Any]] | None  # None: of either kind

    @property
    def name(self) -> str:
        return self.function.__name__

    @property
    def summary(self) -> str:
        """Return the promise in one sentence: the docstring without a leading "Check that"."""
        promise = " ".join((inspect.getdoc(self.function) or "").split()).removeprefix("Check that ")
        return promise[:1].upper() + promise[1:]

    def applies_to(self, subject: Subject) -> bool:
        return self.kind is None or self.kind is subject.kind

    def __call__(self, policy: AnyPolicy | AnyPolicyClass | Subject) -> None:
        """Raise AssertionError (or what the policy raises) if the promise is broken, NotApplicable if there is none."""
        self.function(policy if isinstance(policy, Subject) else Subject(policy))

    def __repr__(self) -> str:
        return self.name
