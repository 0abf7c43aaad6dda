"""A unit of work: what is run and stored as a whole. Knows no experiment."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

Spec = dict[str, Any]
"""The work of a unit, as plain JSON: its ``kind`` says who runs it, the rest is all that its result depends on."""

Found = dict[str, Any]
"""The result of a unit, as plain JSON."""

Row = dict[str, Any]
"""A stored unit: ``experiment``, ``unit`` (its spec), ``found``, ``seconds`` (of one core), ``made`` (where and with what)."""


@dataclass(frozen=True)
class Unit:
    """One piece of one experiment."""

    experiment: str
    spec: Spec

    @property
    def key(self) -> str:
        return key_of(self.spec)

    @property
    def name(self) -> str:
        return f"{self.experiment}: {self.spec.get('label', self.spec['kind'])}"


def key_of(spec: Spec) -> str:
    """Equal for equal specs, whatever the order of their fields."""
    return hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()[:20]
