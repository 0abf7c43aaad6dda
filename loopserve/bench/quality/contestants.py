"""Who takes part in a run: stacks, each as it is or with budgets that let all of them attend to equally much."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from loopserve.bench.budget import budget_for, budget_of, room_for, with_budget
from loopserve.bench.quality.records import Record
from loopserve.core.errors import ConfigError
from loopserve.core.stack.stack import PolicyStack


@dataclass(frozen=True)
class Contestant:
    """A stack in a run. ``share``: of the pairs dense attends to, set anew for every sample; None leaves the stack's own budget."""

    name: str
    family: str  # the stack's name without the share; plots draw one line through a family
    stack: PolicyStack
    share: float | None = None

    @property
    def digest(self) -> str:
        """Equal for contestants that do the same, whatever they are called."""
        if self.share is None:
            return self.stack.digest
        return hashlib.sha256(f"{self.stack.digest} {self.share:g}".encode()).hexdigest()[:16]

    def described(self) -> Record:
        """What a manifest says of it."""
        return {"digest": self.digest, "share": self.share, "described": self.stack.describe()}

    def fields(self) -> Record:
        """What every record of it says."""
        return {"stack": self.name, "family": self.family, "digest": self.digest}

    def fitted(self, lengths: Sequence[int], answers: Sequence[int]) -> PolicyStack:
        """The stack for one dialogue: ``lengths`` of the conversation in tokens at each answer, and of the answers."""
        if self.share is None:
            return self.stack
        # Outputs are attended besides the budget: half of them on average over an answer.
        room = room_for(self.stack, sum(answers) / len(answers) / 2)
        budget = budget_for(self.share, sum(lengths) / len(lengths), room)
        try:
            return with_budget(self.stack, budget)
        except ConfigError as error:
            raise ConfigError(
                f"{self.share:.0%} of this dialogue, {budget} pairs, is no budget for this stack: {error}"
            ) from error


def contestants(stacks: Iterable[PolicyStack], shares: Sequence[float] = ()) -> list[Contestant]:
    """Each stack, or each of those that have a budget with each of the shares (0: its own budget); none twice.

    ConfigError for a name with two meanings.
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
