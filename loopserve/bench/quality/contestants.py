"""List the stacks of a run, unchanged or with budgets that give all of them equal attended pairs."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from loopserve.bench.budget import budget_for, budget_of, uncounted_outputs_of, with_budget
from loopserve.bench.quality.records import Record
from loopserve.core.errors import ConfigError
from loopserve.core.stack.stack import PolicyStack


@dataclass(frozen=True)
class Contestant:
    """Hold one stack of a run. ``share``: attended share of dense's pairs, set per sample; None keeps the stack's budget."""

    name: str
    family: str  # the stack's name without the share; plots draw one line per family
    stack: PolicyStack
    share: float | None = None

    @property
    def digest(self) -> str:
        """Return a digest that is equal for contestants with equal behaviour, independent of their names."""
        if self.share is None:
            return self.stack.digest
        return hashlib.sha256(f"{self.stack.digest} {self.share:g}".encode()).hexdigest()[:16]

    def described(self) -> Record:
        """Return the description for the manifest."""
        return {"digest": self.digest, "share": self.share, "described": self.stack.describe()}

    def fields(self) -> Record:
        """Return the fields that every record of this contestant has."""
        return {"stack": self.name, "family": self.family, "digest": self.digest}

    def fitted(self, lengths: Sequence[int], answers: Sequence[int]) -> PolicyStack:
        """Return the stack for one dialogue. lengths: conversation tokens at each answer. answers: tokens of each answer."""
        if self.share is None:
            return self.stack
        # Outputs are attended besides the budget: half of them on average over an answer.
        uncounted = uncounted_outputs_of(self.stack, sum(answers) / len(answers) / 2)
        budget = budget_for(self.share, sum(lengths) / len(lengths), uncounted)
        try:
            return with_budget(self.stack, budget)
        except ConfigError as error:
            raise ConfigError(
                f"{self.share:.0%} of this dialogue, {budget} pairs, is no budget for this stack: {error}"
            ) from error


def contestants(stacks: Iterable[PolicyStack], shares: Sequence[float] = ()) -> list[Contestant]:
    """Return each stack, and each stack that has a budget with each of the shares (0: its own budget), without duplicates.

    Raises ConfigError for a name with two meanings.
    """
    for share in shares:
        if not 0 <= share <= 1:
            raise ConfigError(f"--attended {share:g}: must be from 0 (a stack's own budget) to 1")
    found: dict[str, Contestant] = {}
    for stack in stacks:
        own = shares if shares and budget_of(stack) is not None else (0.0,)
        for each_share in (share or None for share in own):
            name = stack.name if each_share is None else f"{stack.name}@{each_share:.3g}"
            each = Contestant(name, stack.name, stack, each_share)
            if found.setdefault(name, each).digest != each.digest:
                raise ConfigError(f"two different stacks are called {stack.name!r}: give one of them another 'name'")
    return list(found.values())
