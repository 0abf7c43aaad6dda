"""Take the options of policies whose new tokens attend to sinks and a local window: ``a_shape`` and ``tri_shape``."""

from __future__ import annotations

from pydantic import Field

from loopserve.core.policy.base import PolicyConfig
from loopserve.policies.lines import scaled_count


class LocalWindowConfig(PolicyConfig):
    """Say how many sinks and how many last tokens every new token attends to."""

    sink_tokens: int = Field(128, ge=0, description="First tokens of the conversation that every new token attends to.")
    local_window: int = Field(
        1024, gt=0, description="Last tokens up to and including itself that every new token attends to."
    )
    local_share: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Window as a share of the stored pairs, at most `local_window`; none by default.",
    )
    min_local_window: int = Field(64, gt=0, description="Smallest window that `local_share` gives.")

    def window(self, total_tokens: int) -> int:
        """Return the length of the window where so many pairs are stored."""
        return scaled_count(self.local_window, self.local_share, self.min_local_window, total_tokens)
