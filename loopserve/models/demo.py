"""Provide the bundled trained models: small Llamas that recall facts stated among small talk. Loading them needs no network."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

NAME = "demo"
_WEIGHTS = {"demo": "recall", "demo-no-lookahead": "recall_no_lookahead"}
BUNDLED = tuple(_WEIGHTS)


def is_bundled(model: str) -> bool:
    """Return whether a MODEL argument names a bundled model."""
    return model in _WEIGHTS


def bundled_path(model: str = NAME) -> Path:
    """Return the directory of a bundled model: config, weights and tokenizer."""
    return Path(str(files("loopserve.models") / "weights" / _WEIGHTS[model]))
