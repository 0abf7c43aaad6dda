"""A stack on a plain transformers model: ``model.generate`` as the user knows it, every hook and setting undone at exit."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from loopserve.core.attention import Call
from loopserve.core.engine import TokenEngine
from loopserve.core.errors import InputError, ModelError
from loopserve.core.interfaces import Phase
from loopserve.core.stack import PolicyStack
from loopserve.core.stats import TurnStats
from loopserve.models.cache_view import CacheView
from loopserve.models.huggingface import IMPLEMENTATION, HuggingFaceModel, set_implementation


class Applied:
    """What ``with apply(...)`` yields: the figures of the rows served so far."""

    def __init__(self, engine: TokenEngine) -> None:
        self.engine = engine
        self.last_view: CacheView | None = None

    @property
    def stats(self) -> list[list[TurnStats]]:
        """Per row of the last batch, the figures of each of its turns."""
        return [session.turns for session in self.last_view.sessions] if self.last_view is not None else []


@contextmanager
def applied(model: PreTrainedModel, stack: PolicyStack, **options: Any) -> Iterator[Applied]:
    """Serve every forward pass of ``model`` with a cache under ``stack`` until the block ends. options: the engine's."""
    before = {id(config): (config, config._attn_implementation_internal) for config in _configs(model)}
    engine = TokenEngine(HuggingFaceModel(model), stack, **options)
    stack.check(engine.model.layers, batch=True)
    state = Applied(engine)
    signature = inspect.signature(model.forward)
    handles = []
    try:
        set_implementation(model, IMPLEMENTATION)
        handles.append(model.register_forward_pre_hook(_enter(state, signature), with_kwargs=True))
        handles.append(model.register_forward_hook(_leave(state), with_kwargs=True))
        yield state
    finally:
        for handle in handles:
            handle.remove()
        for config, implementation in before.values():
            config._attn_implementation_internal = implementation


def _configs(model: PreTrainedModel) -> list[Any]:
    return [module.config for module in model.modules() if hasattr(module, "config")]


def _enter(state: Applied, signature: inspect.Signature) -> Any:
    def hook(
        _: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if "loopserve_view" in kwargs:  # an observation pass of our own
            return args, kwargs
        named = {**signature.bind_partial(*args).arguments, **kwargs}
        token_ids = named.get("input_ids")
        if token_ids is None:
            raise ModelError("loopserve.apply needs input_ids; inputs_embeds cannot be run again for an observation")
        view = _view_of(state, named.get("past_key_values"), token_ids.shape[0])
        _begin(state, view, token_ids, named.get("attention_mask"))
        if named.get("position_ids") is None:
            named["position_ids"] = _positions(view, token_ids.shape[1])
        named |= {"past_key_values": view, "use_cache": True, "loopserve_view": view, "attention_mask": None}
        state.last_view = view
        return (), named

    return hook


def _view_of(state: Applied, cache: Cache | None, rows: int) -> CacheView:
    if isinstance(cache, CacheView):
        if len(cache.sessions) != rows:
            raise InputError(f"the cache holds {len(cache.sessions)} rows, the batch has {rows}")
        if cache.owner is not state.engine:
            raise ModelError("this cache was made under another stack or model; start without past_key_values")
        return cache
    if cache is not None and (not isinstance(cache, DynamicCache) or cache.get_seq_length() > 0):
        raise ModelError(
            f"{type(cache).__name__} cannot be used under loopserve.apply: start without past_key_values, "
            "or go on with the cache that an earlier call under apply returned"
        )
    engine = state.engine
    return CacheView([engine.session() for _ in range(rows)], len(engine.model.layers), owner=engine)


def _begin(state: Applied, view: CacheView, token_ids: Tensor, mask: Tensor | None) -> None:
    """Open the pass for each row: its tokens without padding, and where they stand in its own conversation."""
    new = token_ids.shape[1]
    if mask is not None and mask.dim() != 2:
        raise ModelError(f"attention_mask must be a 2-D padding mask [rows, tokens], got {list(mask.shape)}")
    valid = mask[:, -new:].bool() if mask is not None else None
    if valid is not None and bool(valid.all()):
        valid = None
    calls: list[Call | None] = []
    for row, session in enumerate(view.sessions):
        tokens = (token_ids[row] if valid is None else token_ids[row][valid[row]]).tolist()
        if not tokens:
            calls.append(None)
            continue
        seen = session.cache.seen
        phase = Phase.DECODE if len(tokens) == 1 and seen else Phase.PREFILL
        if phase is Phase.PREFILL:
            session.begin_turn(tokens, undoable=False)
        else:
            session.tokens.extend(tokens)
            session.stats.output_tokens += 1
        session.enter(phase)
        positions = torch.arange(seen, seen + len(tokens), device=token_ids.device)
        measure = state.engine.measure_coverage
        calls.append(Call(session, phase, positions, measure=measure, seen_after=seen + len(tokens)))
    view.bind(calls, valid)


def _positions(view: CacheView, new: int) -> Tensor:
    """Positions ``[B, T]`` of each row's own tokens; padding gets 0."""
    rows = []
    for row, call in enumerate(view.calls):
        positions = torch.zeros(new, dtype=torch.long, device="cpu")
        if call is not None:
            places = view.valid[row] if view.valid is not None else slice(None)
            positions = positions.to(call.positions.device)
            positions[places] = call.positions
        rows.append(positions)
    return torch.stack(rows)


def _leave(state: Applied) -> Any:
    def hook(_: torch.nn.Module, __: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        view = state.last_view
        if view is None or view.done or id(view) != id(kwargs.get("loopserve_view")):
            return
        view.done = True
        view.padded_length += kwargs["input_ids"].shape[1]
        for call in view.calls:
            if call is not None:
                state.engine.complete(call)

    return hook
