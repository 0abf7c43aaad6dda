"""Say whether a claim holds: one line of the page's first table."""

from __future__ import annotations

from dataclasses import dataclass

MODEL = "SmolLM2-135M"


@dataclass(frozen=True)
class Verdict:
    """One line of the table of verdicts. holds: None if it was not measured. few: the sample is too small for a verdict."""

    claim: str
    holds: bool | None
    figure: str
    model: str = MODEL
    few: bool = False

    @property
    def word(self) -> str:
        if self.few:
            return "too few to tell"
        return "not measured" if self.holds is None else "yes" if self.holds else "no"
