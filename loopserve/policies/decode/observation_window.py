"""Take the options of policies that are chosen by the queries of an observation window: ``snapkv`` and ``rkv``."""

from __future__ import annotations

from pydantic import Field, model_validator

from loopserve.core.policy.scoring import ScoredConfig


class ObservationWindowConfig(ScoredConfig):
    """Keep the window's own pairs beside the sinks. A policy's configuration declares ``window`` and ``kernel``."""

    window: int
    kernel: int
    sink_tokens: int = Field(0, ge=0, description="First tokens of the conversation that are always kept.")
    recent_window: int = Field(0, ge=0, description="Last tokens kept even where the window is shorter.")

    @model_validator(mode="after")
    def _window_fits(self) -> ObservationWindowConfig:
        if self.kernel % 2 == 0:
            raise ValueError(f"kernel must be odd, got {self.kernel}")
        if self.always_kept > self.budget:
            raise ValueError(
                f"sink_tokens + window ({self.sink_tokens} + {self.window}) exceed the budget ({self.budget})"
            )
        return self

    @property
    def always_kept(self) -> int:
        return self.sink_tokens + max(self.window, self.recent_window)
