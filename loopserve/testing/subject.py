"""Hold a policy under test, the form of a check, and the ways a check can end."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from loopserve.core.errors import ConfigError, LoopServeError
from loopserve.core.policy.interfaces import DecodeCompressor, PrefillSparsifier
from loopserve.testing.variants import AnyPolicy, AnyPolicyClass, budget_of, small

STEPS = (("prefill", 50), ("decode", 10), ("prefill", 1), ("decode", 4), ("prefill", 40), ("decode", 10))


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
