"""Show a layer's pairs to a policy without reading them, where they have to be gathered first."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Self

from torch import Tensor

from loopserve.core.kv.buffers import PairStore
from loopserve.core.kv.key_summaries import KeySummaries
from loopserve.core.policy.interfaces import AttentionInputs
from loopserve.core.policy.patterns import AttentionPattern
from loopserve.kernels.paged import Rows

_PARTS = ("keys", "values")


class Gathered:
    """Hold what was gathered from a store during one call of a layer, for every copy of that call's inputs."""

    def __init__(self, store: PairStore) -> None:
        self.store = store
        self._held: dict[str, Tensor] = {}

    def __call__(self, part: str) -> Tensor:
        """Return the ``keys`` or ``values`` ``[Hkv, Tk, D]``."""
        if part not in self._held:
            self._held[part] = self.store.keys if part == "keys" else self.store.values
        return self._held[part]

    def holds(self, tensor: Tensor) -> bool:
        return any(tensor is each for each in self._held.values())

    def release(self) -> None:
        """Free the copies. What is asked for later is gathered again."""
        self._held = {}


@dataclass(frozen=True, eq=False)
class DeferredInputs(AttentionInputs):
    """Gather keys and values when a policy first asks for them. Shapes, summaries and selections do not ask.

    gathered: the source of both. ``keys`` and ``values`` are None when made, unless a policy has put others in their place.
    """

    gathered: Any = None  # Gathered; a field behind those with defaults needs one

    def __post_init__(self) -> None:
        for part in _PARTS:
            given = self.__dict__[part]
            if given is None or self.gathered.holds(given):
                del self.__dict__[part]  # so that __getattr__ is asked

    def __getattr__(self, name: str) -> Any:
        if name in _PARTS:
            return self.gathered(name)
        raise AttributeError(name)

    def changed(self, **fields: Any) -> Self:
        held: dict[str, Any] = {part: self.__dict__.get(part) for part in _PARTS}
        return replace(self, **held | fields)

    def rows_for(self, pattern: AttentionPattern) -> tuple[Rows, Rows]:
        given = any(part in self.__dict__ for part in _PARTS)
        rows = self.gathered.store.rows if pattern.reads_blocks and not given else None
        return (self.keys, self.values) if rows is None else rows

    @property
    def _own_keys(self) -> Tensor | None:
        """Return keys that a policy has put in place of the store's, or None."""
        keys: Tensor | None = self.__dict__.get("keys")
        return keys

    @property
    def kv_heads(self) -> int:
        own = self._own_keys
        heads: int = self.gathered.store.heads if own is None else own.shape[0]
        return heads

    @property
    def total_tokens(self) -> int:
        own = self._own_keys
        total: int = self.gathered.store.length if own is None else own.shape[1]
        return total

    def _update(self, summaries: KeySummaries) -> None:
        if self._own_keys is None:
            self.gathered.store.summarise(summaries)
        else:
            summaries.update(self.keys)

    def _prepare(self, summaries: KeySummaries) -> tuple[Tensor | None, int]:
        self._update(summaries)  # reads new keys alone, where requests with a common prefix share summaries
        return None, 0
