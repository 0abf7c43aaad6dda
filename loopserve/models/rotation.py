"""Rotate each conversation of a pass by its own length, in models whose rotation depends on it.

Transformers takes the greatest position of a pass as the length of its conversation, and caches the result in the rotary module. A
pass of loopserve contains several conversations, pieces of a longer prompt and rows that are computed again. The rotary module is
therefore called once per length, each time with positions of that length. Every token gets the result for the length of its own
conversation.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_GROWING = "dynamic"  # NTK-aware scaling whose base grows with the length
_SWITCHING = "longrope"  # LongRoPE (arXiv 2402.13753): two sets of factors, changed at the original window
_SCALED = ("linear", _GROWING)  # types whose configuration may leave max_position_embeddings at the original window
_EXTENDED = ("yarn", _SWITCHING, "llama3")  # types that name their original window


def rope_parameters(config: Any) -> list[dict[str, Any]]:
    """Return the rotation parameters of a configuration, those of each layer type where they differ."""
    parameters = getattr(config, "rope_parameters", None)
    if not isinstance(parameters, dict):
        return []
    nested = [each for each in parameters.values() if isinstance(each, dict) and "rope_type" in each]
    return nested or [parameters]


def longest_conversation(config: Any) -> int | None:
    """Return the greatest number of tokens of a model: its configured positions, or more if its rotation is scaled for more."""
    limit: int | None = getattr(config, "max_position_embeddings", None)
    if limit is None:
        return None
    longest = []
    for each in rope_parameters(config):
        factor, window = each.get("factor"), limit
        if each.get("rope_type") in _EXTENDED:
            window = each.get("original_max_position_embeddings") or limit
        elif each.get("rope_type") not in _SCALED:
            factor = None
        longest.append(int(max(limit, (factor or 1.0) * window)))
    return min(longest, default=limit)


class Rotation:
    """Describe how the rotation of a model depends on the length of a conversation, and set it for each pass."""

    def __init__(self, model: nn.Module, config: Any) -> None:
        kinds = {str(each.get("rope_type")): each for each in rope_parameters(config)}
        limit = getattr(config, "max_position_embeddings", None) or 0
        self.grows = any(_GROWING in kind for kind in kinds)
        self._windows = [
            each.get("original_max_position_embeddings") or limit for kind, each in kinds.items() if kind == _SWITCHING
        ]
        self._limit = limit
        self._modules: list[nn.Module] = []
        if self.grows or self._windows:
            self._modules = [each for each in model.modules() if hasattr(each, "rope_type") and hasattr(each, "config")]
        self._now = threading.local()

    @property
    def fixed(self) -> bool:
        """Return whether all conversations rotate alike."""
        return not self._modules

    def of_length(self, tokens: int) -> int:
        """Return one length for all lengths at which a conversation rotates like one of ``tokens`` tokens; 0 = short."""
        if self.fixed:
            return 0
        if self.grows and tokens > self._limit:
            return tokens
        return max((window + 1 for window in self._windows if tokens > window), default=0)

    @contextmanager
    def as_long_as(self, lengths: Tensor | None) -> Iterator[None]:
        """Run a pass whose tokens belong to conversations of these lengths, int64 ``[B, T]`` of ``of_length``."""
        with self.watched():
            self.begin(lengths)
            try:
                yield
            finally:
                self.begin(None)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Make the rotary modules follow ``begin`` until the block ends."""
        handles = [each.register_forward_hook(self._hook, with_kwargs=True) for each in self._modules]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def begin(self, lengths: Tensor | None) -> None:
        """Set the lengths for the tokens of this thread's next pass. Call it with None after the pass."""
        self._now.lengths = lengths

    def _hook(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        lengths: Tensor | None = getattr(self._now, "lengths", None)
        if lengths is None:  # a pass of other code, in another thread
            return output
        named = inspect.signature(module.forward).bind(*args, **kwargs).arguments
        extra = {name: value for name, value in named.items() if name == "layer_type"}
        vectors, positions = named["x"], named["position_ids"]
        lengths = lengths.to(positions.device)
        found: list[Tensor] = []
        for length in lengths.unique().tolist():
            parts = self._rotated(module, vectors, positions, int(length), extra)
            here = (lengths == length)[..., None]
            found = [torch.where(here, new, old) for new, old in zip(parts, found or parts, strict=True)]
        return tuple(found)

    def _rotated(
        self, module: Any, vectors: Tensor, positions: Tensor, length: int, extra: dict[str, Any]
    ) -> Sequence[Tensor]:
        """Return cos and sin as in a pass of one conversation of this length. The rows of longer conversations are not used."""
        if self.grows:  # restore the module's original base, which it does only on a short pass
            module.forward(vectors, torch.zeros_like(positions), **extra)
        if not length:
            short = min([*self._windows, *([self._limit] if self.grows else [])])
            found: Sequence[Tensor] = module.forward(vectors, positions.clamp(max=short - 1), **extra)
            return found
        asked = positions.clamp(max=length - 1) if self.grows else positions
        last = torch.full_like(positions[..., :1], length - 1)
        found = module.forward(vectors, torch.cat([asked, last], dim=-1), **extra)
        return [part[..., :-1, :] for part in found]
