"""Show which parts of a conversation an answer attended to, for requests that ask for ``attention_map``."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from loopserve.api import Engine
from loopserve.core.engine.attention_map import AttentionMap, bucket_edges, bucket_turn
from loopserve.models.chat import Prompt
from loopserve.serve.records import Path

MAX_BUCKETS = 64
MAX_ROWS = 32
_EXCERPT_TOKENS, _EXCERPT_CHARACTERS = 24, 100


class AttendedParts:
    """Hold the attention map of one answer with the buckets' turns and texts. Used by the model's thread only."""

    def __init__(self, engine: Engine, path: Path, prompt: Prompt) -> None:
        self._tokens = path.tokens + list(prompt.tokens)
        self._ends = [*path.ends, len(self._tokens)]
        self._engine = engine
        self._reported = 0  # steps whose shares were given
        self.counts = AttentionMap(bucket_edges(self._ends, MAX_BUCKETS))

    def latest(self) -> dict[str, Any] | None:
        """Return the percentages of the latest step, with the buckets the first time; None if no step was added since."""
        if self.counts.steps <= self._reported:
            return None
        row: dict[str, Any] = {"row": _percent(self.counts.last())}
        found = row if self._reported else row | {"buckets": self.buckets}
        self._reported = self.counts.steps
        return found

    @property
    def buckets(self) -> list[dict[str, Any]]:
        """Return the buckets: tokens ``start`` to ``end``, the turn that they begin in, how their text begins.

        The last one is the answer itself; its end is None.
        """
        edges = self.counts.edges
        found: list[dict[str, Any]] = [
            {"start": start, "end": end, "turn": bucket_turn(self._ends, start), "text": self._excerpt(start, end)}
            for start, end in pairwise(edges)
        ]
        return [*found, {"start": edges[-1], "end": None, "turn": len(self._ends) - 1, "text": ""}]

    def _excerpt(self, start: int, end: int) -> str:
        tokens = self._tokens[start : min(end, start + _EXCERPT_TOKENS)]
        text = str(self._engine.tokenizer.tokenizer.decode(tokens, skip_special_tokens=True))
        return " ".join(text.split())[:_EXCERPT_CHARACTERS]

    def as_dict(self) -> dict[str, Any]:
        """Return the map as the API shows it. Percentages are of the pairs that dense attention would attend to in a bucket."""
        steps = self.counts.steps
        return {
            "buckets": self.buckets,
            "percent": _percent(self.counts.share()) if steps else [],
            "rows": [_percent(row) for row in self.counts.shares(MAX_ROWS)],
            "steps": steps,
            "steps_per_row": -(-steps // MAX_ROWS),
        }


def _percent(shares: Sequence[float | None]) -> list[float | None]:
    return [None if share is None else round(100 * share, 1) for share in shares]
