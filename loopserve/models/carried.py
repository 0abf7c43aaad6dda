"""Carry recurrent states from pass to pass also in families whose code drops them before several tokens.

Some state-space layers of transformers (jamba's) begin a pass of more than one token with an empty state, whatever the cache holds. A
second turn, or a second piece of a prompt, would be answered wrongly in silence. Each kind of layer is therefore tried once, with
two different states; one that does not see them computes such passes token by token.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, LinearAttentionLayer

from loopserve.core.errors import ModelError
from loopserve.core.kv.recording import plain_tensors
from loopserve.core.policy.layers import LayerSpec
from loopserve.models.layer_parts import attention_modules, decoder_of
from loopserve.models.recurrent import EmptyLayer, RecurrentCacheLayer

_changing = threading.Lock()
_users: dict[nn.Module, int] = {}  # blocks of any thread in which a module computes token by token
_CACHE_NAMES = ("cache_params", "past_key_values", "cache")


class Carried:
    """Know the layers of a model that drop their state, and compute these token by token."""

    def __init__(self, model: PreTrainedModel, layers: Sequence[LayerSpec]) -> None:
        """Try each kind of recurrent layer. ModelError if one cannot be tried."""
        self.layers = tuple(layers)  # with the bytes of their states
        self._stepped: list[nn.Module] = []
        recurrent = {spec.index: spec for spec in layers if spec.recurrent}
        if not recurrent:
            return
        tried: dict[type, tuple[bool, int]] = {}
        held = dict.fromkeys(recurrent, 0)
        found = _mixers(model, recurrent)
        for spec in recurrent.values():
            if spec.index not in found:
                raise ModelError(
                    f"{type(model).__name__}: the recurrent part of layer {spec.index} is not recognised, so this model is not "
                    "supported"
                )
        width = model.config.get_text_config(decoder=True).hidden_size
        for index, modules in found.items():
            for module in modules:
                kind = type(module)
                if kind not in tried:
                    tried[kind] = _tried(module, recurrent[index], width)
                drops, held_bytes = tried[kind]
                held[index] += held_bytes
                if drops:
                    self._stepped.append(module)
        self.layers = tuple(replace(spec, state_bytes=held.get(spec.index, 0)) for spec in layers)

    @contextmanager
    def token_by_token(self) -> Iterator[None]:
        """Have the layers that drop their state compute passes over sessions token by token until the block ends."""
        with _changing:
            for module in self._stepped:
                _users[module] = _users.get(module, 0) + 1
                if _users[module] == 1:
                    module.forward = _stepping(module, module.forward)
        try:
            yield
        finally:
            with _changing:
                for module in self._stepped:
                    _users[module] -= 1
                    if not _users[module]:
                        del module.forward, _users[module]


def _mixers(model: PreTrainedModel, layers: Mapping[int, LayerSpec]) -> dict[int, list[nn.Module]]:
    """Return the innermost modules of recurrent layers that take a cache, by layer, without those that attend to pairs."""
    attention = {
        module for index, module in attention_modules(model).items() if index in layers and layers[index].holds_pairs
    }
    taking = [
        module
        for module in decoder_of(model).modules()
        if getattr(module, "layer_idx", None) in layers and _cache_name(module) is not None
    ]
    found: dict[int, list[nn.Module]] = {}
    for module in taking:
        inner = any(each is not module and each in set(taking) for each in module.modules())
        if not inner and module not in attention:
            found.setdefault(module.layer_idx, []).append(module)  # type: ignore[arg-type]
    return found


def _cache_name(module: nn.Module) -> str | None:
    names = inspect.signature(module.forward).parameters
    return next((each for each in _CACHE_NAMES if each in names), None)


def _tried(module: nn.Module, spec: LayerSpec, width: int) -> tuple[bool, int]:
    """Return whether a pass of two tokens gives the same output after two different states, and the bytes of a state."""
    weight = next(module.parameters(), None)
    if weight is None or weight.device.type == "meta":
        return False, 0
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(2, 1, 2, width, generator=generator, dtype=torch.float32, device="cpu")
    first, second = tokens.to(device=weight.device, dtype=weight.dtype)
    name = _cache_name(module) or _CACHE_NAMES[0]
    outputs = []
    try:
        with plain_tensors():
            for shift in (0.0, 1.0):
                layer = LinearAttentionLayer(number_of_states=spec.recurrent)
                cache = Cache(layers=[*(EmptyLayer() for _ in range(spec.index)), layer])
                module(hidden_states=first, **{name: cache})
                convolved = [each for each in layer.conv_states.values() if each is not None]
                states = [each for each in layer.recurrent_states.values() if each is not None]
                held = sum(each.numel() * each.element_size() for each in (*convolved, *states))
                for state in states or convolved:
                    state.add_(shift)
                found = module(hidden_states=second, **{name: cache})
                outputs.append(found if isinstance(found, Tensor) else torch.cat([each.flatten() for each in found]))
    except Exception as error:  # code of another family, which may not accept this call
        raise ModelError(
            f"layer {spec.index} ({type(module).__name__}) cannot be tried by itself ({type(error).__name__}: {error}), so it is not "
            "known whether it carries its state; this model is not supported"
        ) from error
    return torch.equal(*outputs), held


def _stepping(module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    signature, name = inspect.signature(forward), _cache_name(module) or _CACHE_NAMES[0]
    index: int = module.layer_idx  # type: ignore[assignment]

    def stepped(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        named = bound.arguments
        hidden, cache = named["hidden_states"], named.get(name)
        layer = cache.layers[index] if isinstance(cache, Cache) else None
        begun = isinstance(layer, RecurrentCacheLayer) and all(layer.has_previous_state.values())
        if not begun or hidden.shape[1] == 1:
            return forward(*args, **kwargs)
        outputs = []
        for row in hidden.split(1, dim=1):
            named["hidden_states"] = row
            outputs.append(forward(*bound.args, **bound.kwargs))
        return torch.cat(outputs, dim=1)

    return stepped
