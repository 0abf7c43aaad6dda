"""Cache what the layers of one conversation hold: KV pairs by layer, and the states of recurrent or convolution layers.

Depends on no policy and no model.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from loopserve.core.kv.layer_cache import Counted, LayerCache, SharedLayerCache

RecurrentStates = dict[int, dict[str, Tensor]]  # by layer and name, without a batch dimension


def copied_states(states: RecurrentStates) -> RecurrentStates:
    """Return copies that share no memory: models write into these tensors."""
    return {layer: {name: each.clone() for name, each in named.items()} for layer, named in states.items()}


def bytes_of_states(states: RecurrentStates) -> int:
    """Return the bytes of all tensors."""
    return sum(each.numel() * each.element_size() for named in states.values() for each in named.values())


class KVCache:
    """Hold the layers of one conversation. ``seen`` is its logical length.

    recurrent: the states of layers that keep one, after ``seen`` tokens. They cannot be cut back: ``truncate`` drops them, and
    whoever truncates puts the states of that length in their place.
    """

    def __init__(
        self, layers: int, *, without_pairs: frozenset[int] = frozenset(), reads: Mapping[int, int] | None = None
    ) -> None:
        """without_pairs: indices of layers that hold none. reads: by layer, the earlier layer whose pairs it attends to."""
        self._without_pairs, self._reads = without_pairs, dict(reads or {})
        counted = Counted()
        self.layers: list[LayerCache] = []
        for index in range(layers):
            owner = self._reads.get(index)
            self.layers.append(LayerCache(counted) if owner is None else SharedLayerCache(self.layers[owner]))
        self.recurrent: RecurrentStates = {}
        self._first = next((index for index in range(layers) if index not in without_pairs), 0)

    @property
    def own_layers(self) -> list[LayerCache]:
        """Return the layers that hold pairs of their own."""
        return [
            layer
            for index, layer in enumerate(self.layers)
            if index not in self._without_pairs and index not in self._reads
        ]

    @property
    def seen(self) -> int:
        return self.layers[self._first].seen if self.layers else 0

    @property
    def store_bytes(self) -> int:
        return sum(layer.store_bytes for layer in self.layers) + bytes_of_states(self.recurrent)

    @property
    def active_bytes(self) -> int:
        return sum(layer.active.nbytes for layer in self.layers if layer.active is not None)

    @property
    def nbytes(self) -> int:
        return self.store_bytes + self.active_bytes

    @property
    def intact(self) -> bool:
        """Return whether only the cache has written into its pairs."""
        return all(layer.store is None or layer.store.intact for layer in self.layers)

    @property
    def allocated_bytes(self) -> int:
        """Return the bytes allocated by all layers, unused capacity and recurrent states included."""
        return sum(layer.allocated_bytes for layer in self.layers) + bytes_of_states(self.recurrent)

    def release(self) -> None:
        for layer in self.layers:
            layer.release()

    def reserve(self, tokens: int) -> None:
        """Provide, with each layer's next append, capacity for ``tokens`` more pairs."""
        for layer in self.layers:
            layer.reserve(tokens)

    def truncate(self, length: int) -> None:
        """Remove every position from ``length`` on, in layers that have seen it. An interrupted pass fills only some layers."""
        for layer in self.layers:
            layer.truncate(min(length, layer.seen))
        self.recurrent = {}

    def fork(self) -> KVCache:
        other = KVCache(len(self.layers), without_pairs=self._without_pairs, reads=self._reads)
        counted = Counted()
        for index, layer in enumerate(self.layers):
            if isinstance(layer, SharedLayerCache):
                other.layers[index] = layer.fork_beside(other.layers[self._reads[index]])
            else:
                other.layers[index] = layer.fork(counted)
        other.recurrent = copied_states(self.recurrent)
        return other

    def clear(self) -> None:
        empty = KVCache(len(self.layers), without_pairs=self._without_pairs, reads=self._reads)
        self.layers, self.recurrent = empty.layers, {}
