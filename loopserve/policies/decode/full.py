"""Implement full decoding: every stored pair is attended."""

from __future__ import annotations

from typing import ClassVar

from loopserve.core.policy.base import Capabilities
from loopserve.core.policy.interfaces import DecodeCompressor


class FullDecode(DecodeCompressor[None]):
    """Attend to every stored pair in each decode step: the baseline for every other policy.

    Multi-turn: the store only grows; nothing is selected and nothing is ever evicted.
    """

    name: ClassVar[str] = "full"
    paper: ClassVar[str] = ""
    capabilities: ClassVar[Capabilities] = Capabilities(passive=True)

    def init_state(self) -> None:
        return None
