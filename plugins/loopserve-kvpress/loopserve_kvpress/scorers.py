"""Define a kvpress-style scorer, and find one by name."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from importlib import import_module, metadata
from typing import Any, Protocol

from torch import Tensor

from loopserve import ConfigError
from loopserve.core.errors import did_you_mean

GROUP = "loopserve_kvpress"  # entry points of this group name scorers of other distributions
Option = bool | int | float | str | None


class Scorer(Protocol):
    """Describe the part of the interface of ``kvpress.ScorerPress`` that this adapter uses."""

    def score(
        self, module: Any, hidden_states: Tensor, keys: Tensor, values: Tensor, attentions: Tensor | None, kwargs: Any
    ) -> Tensor:
        """Return the importance ``[1, Hkv, Tk]`` of pairs with keys and values ``[1, Hkv, Tk, D]``.

        Pairs with larger values are kept.
        """


def find_scorer(name: str) -> type[Scorer]:
    """Return the class of a scorer: an entry point of the group ``loopserve_kvpress``, else a class of the package
    kvpress.

    Raises ConfigError if there is none of that name, or if it has no ``score``.
    """
    entries = {each.name: each for each in metadata.entry_points(group=GROUP)}
    found = entries[name].load() if name in entries else _of_kvpress(name, entries)
    if not (inspect.isclass(found) and callable(getattr(found, "score", None))):
        raise ConfigError(
            f"{name!r} has no method score(module, hidden_states, keys, values, attentions, kwargs), so it ranks no pairs"
        )
    return found


def _of_kvpress(name: str, entries: Mapping[str, Any]) -> Any:
    try:
        package = import_module("kvpress")
    except ImportError as error:
        raise ConfigError(
            f"unknown scorer {name!r}{did_you_mean(name, entries)}, and the package kvpress cannot be imported ({error}): "
            f"name a scorer of your own as an entry point of the group {GROUP!r}"
        ) from error
    known = [each for each, value in vars(package).items() if callable(getattr(value, "score", None))]
    if not hasattr(package, name):
        raise ConfigError(f"unknown scorer {name!r}{did_you_mean(name, [*entries, *known])}")
    return getattr(package, name)


def make_scorer(name: str, options: Mapping[str, Option]) -> Scorer:
    """Return a scorer with its options. Raises ConfigError if it does not accept them."""
    kind = find_scorer(name)
    if "compression_ratio" in options:
        raise ConfigError("compression_ratio is not needed: the policy's budget says how many pairs are kept")
    try:
        return kind(**options)
    except (TypeError, ValueError, AssertionError) as error:
        taken = ", ".join(inspect.signature(kind).parameters) or "nothing"
        raise ConfigError(f"{name} does not take these options ({error}); it takes {taken}") from error
