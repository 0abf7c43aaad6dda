"""Assign a stack's policies to the layers of a model.

Every distinct policy object of a stack gets a slot, ``prefill:0``, ``decode:0``, ... in the order of the layers. A session keeps
one state per slot.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

from loopserve.core.engine.break_even import BreakEven
from loopserve.core.guard.faults import Owners, Policy, blamed
from loopserve.core.kv.cache import KVCache
from loopserve.core.kv.selection import Retention
from loopserve.core.policy.interfaces import DecodeCompressor, PrefillSparsifier
from loopserve.core.policy.layers import LayerSpec, LayerType
from loopserve.core.stack.stack import PolicyStack

_CALLED = ("before_attention", "after_attention", "after_forward")  # the methods that a pass calls


@dataclass(frozen=True)
class LayerPolicies:
    """Name the policies of one layer; both are None where the layer stays as the model has it."""

    spec: LayerSpec
    sparsifier: PrefillSparsifier | None = None
    compressor: DecodeCompressor[Any] | None = None
    prefill_slot: str = ""
    decode_slot: str = ""
    acts: bool = False  # the compressor overrides a method that a pass calls
    selects_before: bool = False  # the compressor overrides before_attention
    observes_after: bool = False  # the compressor overrides after_attention
    retention: Retention = Retention.KEEP  # what the compressor declares, asked once
    most_pairs: int | None = None
    dense_below_tokens: int = 0

    def shows(self, stored: int) -> bool:
        """Return whether the compressor is called for this layer while it holds ``stored`` pairs per KV head."""
        return self.acts and stored > self.dense_below_tokens


class Slots:
    """Hold the policies of every layer and of every slot. All sessions of an engine share it."""

    def __init__(self, layers: Sequence[LayerSpec], stack: PolicyStack, break_even: BreakEven | None = None) -> None:
        """break_even: below which lengths the layers stay dense, beside what the policies say themselves."""
        self.break_even = break_even or BreakEven()
        self._named: dict[int, str] = {}
        self.policies: dict[str, Policy] = {}
        self.by_layer = tuple(self._assign(layer, stack, len(layers)) for layer in layers)
        self.sessions: WeakSet[Any] = WeakSet()  # the open sessions under this stack; a ledger counts their memory
        self.evicts = any(each.retention is Retention.EVICT for each in self.by_layer)
        self.owners = frozenset(each.spec.reads for each in self.by_layer if each.spec.reads is not None)
        self.recurrent = any(each.spec.recurrent > 0 for each in self.by_layer)
        self.repeatable = all(each.spec.repeatable for each in self.by_layer)
        self._layers: dict[str, tuple[LayerSpec, ...]] = {
            slot: tuple(each.spec for each in self.by_layer if each.decode_slot == slot) for slot in self.policies
        }

    @property
    def compressors(self) -> dict[str, DecodeCompressor[Any]]:
        """Return the compressors by slot."""
        return {slot: each for slot, each in self.policies.items() if isinstance(each, DecodeCompressor)}

    def empty_cache(self) -> KVCache:
        """Return the cache of a conversation that has no token yet."""
        specs = [each.spec for each in self.by_layer]
        return KVCache(
            len(specs),
            without_pairs=frozenset(place for place, spec in enumerate(specs) if not spec.holds_pairs),
            reads={place: spec.reads for place, spec in enumerate(specs) if spec.reads is not None},
        )

    def layers_of(self, slot: str) -> tuple[LayerSpec, ...]:
        """Return the layers that the compressor of a slot selects for, in order."""
        return self._layers[slot]

    def _assign(self, layer: LayerSpec, stack: PolicyStack, total: int) -> LayerPolicies:
        if layer.type is not LayerType.FULL:
            return LayerPolicies(layer)
        sparsifier = stack.prefill_for(layer.index, total)
        compressor = stack.decode_for(layer.index, total)
        retention, most, dense_below = _declared(compressor, stack.owners)
        return LayerPolicies(
            layer,
            sparsifier,
            compressor,
            self._slot("prefill", sparsifier),
            self._slot("decode", compressor),
            acts=any(getattr(type(compressor), each) is not getattr(DecodeCompressor, each) for each in _CALLED),
            selects_before=type(compressor).before_attention is not DecodeCompressor.before_attention,
            observes_after=type(compressor).after_attention is not DecodeCompressor.after_attention,
            retention=retention,
            most_pairs=most,
            dense_below_tokens=self.break_even.dense_below(dense_below),
        )

    def _slot(self, kind: str, policy: Policy) -> str:
        if id(policy) not in self._named:  # the stack keeps the object alive, so its id is not reused
            slot = f"{kind}:{sum(each.startswith(kind) for each in self.policies)}"
            self._named[id(policy)] = slot
            self.policies[slot] = policy
        return self._named[id(policy)]


def _declared(compressor: DecodeCompressor[Any], owners: Owners) -> tuple[Retention, int | None, int]:
    with blamed(compressor, "its declaration", owners):
        return Retention(compressor.retention), compressor.most_pairs, int(compressor.dense_below_tokens)
