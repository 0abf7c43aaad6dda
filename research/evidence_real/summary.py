"""Sum up over texts how a stack agrees with dense attention, and what it costs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from research.evidence.words import percent
from research.evidence_real.comparison import BLOCK, Found


def standard_error(parts: Sequence[Found], name: str) -> float:
    """Return the standard error of a figure's mean per token, from the means of blocks, whose tokens depend on each other."""
    means = [each / BLOCK for part in parts for each in part[name][: part["tokens"] // BLOCK]]
    if len(means) < 2:
        return math.nan
    middle = sum(means) / len(means)
    return math.sqrt(sum((each - middle) ** 2 for each in means) / (len(means) - 1) / len(means))


@dataclass
class Agreement:
    """Sum up what several texts gave for one stack."""

    parts: list[Found]

    @property
    def tokens(self) -> int:
        return sum(int(each["tokens"]) for each in self.parts)

    def _mean(self, name: str) -> float:
        return float(sum(sum(each[name]) for each in self.parts) / self.tokens)

    @property
    def kl(self) -> float:
        return self._mean("kl")

    @property
    def kl_error(self) -> float:
        return standard_error(self.parts, "kl")

    @property
    def same(self) -> float:
        return self._mean("same")

    @property
    def same_error(self) -> float:
        return standard_error(self.parts, "same")

    @property
    def perplexity(self) -> float:
        """Return the change of perplexity, as a share."""
        return math.exp(self._mean("loss")) - 1

    def share(self, over: str, under: str = "dense") -> float | None:
        costs = [each["costs"] for each in self.parts if "costs" in each]
        whole = sum(each[under] for each in costs)
        return sum(each[over] for each in costs) / whole if whole else None

    @property
    def attended(self) -> float | None:
        return self.share("attended", "attended_of")

    @property
    def bytes(self) -> float | None:
        return self.share("bytes")

    @property
    def bytes_bf16(self) -> float | None:
        halved = self.share("halved")
        return None if halved is None else 2 * halved

    @property
    def bytes_all(self) -> float | None:
        """The bytes with those read before the first output, of a bfloat16 store."""
        before, halved = self.share("before"), self.share("halved")
        return None if before is None or halved is None else 2 * halved + before

    def mean(self, name: str) -> float | None:
        values = [each["prefill"][name] for each in self.parts if "prefill" in each]
        return sum(values) / len(values) if values and None not in values else None


def row(label: str, found: Agreement) -> list[str]:
    return [
        label,
        f"{found.kl:.4f} ± {found.kl_error:.4f}",
        f"{100 * found.same:.1f} ± {100 * found.same_error:.1f} %",
        f"{100 * found.perplexity:+.2f} %",
        percent(found.attended),
        percent(found.bytes_bf16),
        percent(found.bytes_all),
        percent(found.mean("cells")),
        percent(found.mean("tiles")),
    ]


HEADER = ["stack", "KL", "top-1", "perplexity", "attended", "bytes", "all bytes", "cells", "tiles"]
