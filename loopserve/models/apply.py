"""Serve a plain transformers model under a stack: ``model.generate`` as the user knows it, everything undone at exit."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from loopserve.core.engine.engine import TokenEngine
from loopserve.core.engine.forward import ForwardContext
from loopserve.core.engine.stats import TurnStats
from loopserve.core.errors import InputError, ModelError
from loopserve.core.policy.interfaces import Phase
from loopserve.core.stack.stack import PolicyStack
from loopserve.models.bridge import IMPLEMENTATION, TransformersModel
from loopserve.models.cache import CacheRows, Pass, Span, adopt, cache_over, rows_of
from loopserve.models.generate_prompt import CACHE_KEYWORDS, current_prompt, prompts_announced
from loopserve.models.layers import cache_keyword, set_implementation, takes_keywords, unwrapped
from loopserve.models.recurrent import load_states, save_states
from loopserve.models.rotation import Rotation

_MEDIA = ("pixel_values", "image", "video", "audio", "input_features", "mm_encoder_outputs")
_serving: set[int] = set()  # ids of the models inside an apply, in any thread
_serving_lock = threading.Lock()


class Applied:
    """Give the figures of the rows served inside a ``with apply(...)`` block."""

    def __init__(self, engine: TokenEngine, rotary: Rotation) -> None:
        self.engine = engine
        self.rotary = rotary
        self.last_rows: CacheRows | None = None

    @property
    def stats(self) -> list[list[TurnStats]]:
        """Per row of the last batch, the figures of each of its turns."""
        return [session.turns for session in self.last_rows.sessions] if self.last_rows is not None else []


@contextmanager
def applied(model: PreTrainedModel, stack: PolicyStack, **options: Any) -> Iterator[Applied]:
    """Serve every forward pass of ``model`` under ``stack`` until the block ends. options: those of the engine.

    model: a transformers model, or a wrapper around one (PEFT, ``torch.compile``).
    """
    model = unwrapped(model)
    with _claimed(model):
        before = {id(config): (config, config._attn_implementation_internal) for config in _configs(model)}
        served = TransformersModel(model)
        engine = TokenEngine(served, stack, **options)
        stack.check(engine.model.layers, batch=True)
        state = Applied(engine, served.rotary)
        handles: list[Any] = []
        try:
            set_implementation(model, IMPLEMENTATION)
            handles.append(model.register_forward_pre_hook(_enter(state, model), with_kwargs=True))
            handles.append(model.register_forward_hook(_leave(state), with_kwargs=True))
            with prompts_announced(model), state.rotary.watched(), served.carried.token_by_token():
                yield state
        finally:
            for handle in handles:
                handle.remove()
            for config, implementation in before.values():
                config._attn_implementation_internal = implementation


@contextmanager
def _claimed(model: PreTrainedModel) -> Iterator[None]:
    """Hold a model for one apply at a time. ModelError if it is served already, in whichever thread."""
    with _serving_lock:
        taken = (
            id(model) in _serving or model.config.get_text_config(decoder=True)._attn_implementation == IMPLEMENTATION
        )
        if taken:
            raise ModelError(
                "this model is served by loopserve already, by an Engine or another loopserve.apply: end that block first, "
                "or load the model a second time"
            )
        _serving.add(id(model))
    try:
        yield
    finally:
        with _serving_lock:
            _serving.discard(id(model))


def _configs(model: PreTrainedModel) -> list[Any]:
    return [module.config for module in model.modules() if hasattr(module, "config")]


Hook = Callable[..., Any]


def _enter(state: Applied, model: PreTrainedModel) -> Hook:
    signature, keyword, takes = inspect.signature(model.forward), cache_keyword(model), takes_keywords(model)

    def hook(
        _: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if "loopserve_pass" in kwargs:  # an observation pass of the engine
            return args, kwargs
        named = {**signature.bind_partial(*args).arguments, **kwargs}
        cache = next((named.pop(name) for name in CACHE_KEYWORDS if named.get(name) is not None), None)
        given = rows_of(cache) if isinstance(cache, Cache) else None
        if given is not None and given.owner is None and given.under_way is not None:
            return args, kwargs  # a pass of the engine, in a family that takes no keyword of ours
        token_ids = named.get("input_ids")
        if token_ids is None:
            raise ModelError("loopserve.apply needs input_ids; inputs_embeds cannot be run again for an observation")
        keep = named.get("use_cache") is not False
        if keep and cache is None:
            cache = _dropped(state, token_ids, named.get("attention_mask"))
        cache, rows = _cache_of(state, cache if keep else None, token_ids.shape[0])
        _note_media(rows, named)
        rows.kept = keep
        state.rotary.begin(None)
        positions = _begin(state, rows, token_ids, named.get("attention_mask"), named.get("position_ids"))
        named |= {"position_ids": positions, keyword: cache, "use_cache": True, "attention_mask": None}
        named |= {"loopserve_pass": rows.under_way} if takes else {}
        named |= _rows_kept(state, named.get("logits_to_keep"), token_ids)
        if rows.under_way is not None:
            _require_no_padding(state, rows, token_ids)
            load_states(cache, rows.sessions)
            state.rotary.begin(rows.under_way.rotations(*token_ids.shape))
        state.last_rows = rows
        if (prompt := current_prompt()) is not None:
            prompt.rows = rows
        return (), named

    return hook


def _dropped(state: Applied, token_ids: Tensor, mask: Tensor | None) -> Cache | None:
    """Return the cache that ``generate`` gave up at a window of LongRoPE, while it goes on with single tokens.

    Early versions of transformers do so in families like phi3; the conversation is computed anew from its tokens here.
    """
    rows = prompt.rows if (prompt := current_prompt()) is not None else None
    goes_on = rows is not None and rows.owner is state.engine and rows.kept and rows.under_way is None
    if rows is None or not goes_on or mask is None or mask.dim() != 2:
        return None
    columns = rows.columns + token_ids.shape[1]
    fits = rows.columns > 0 and mask.shape[1] == columns and len(rows.sessions) == len(token_ids)
    return cache_over(rows, state.engine.model.layers) if fits else None


def _rows_kept(state: Applied, kept: Any, token_ids: Tensor) -> dict[str, Any]:
    """Name the rows whose logits are wanted one by one where a number would leave rows out of layers that read other layers' pairs."""
    reads = any(spec.reads is not None for spec in state.engine.model.layers)
    if not reads or not isinstance(kept, int) or kept == 0:
        return {}
    end = token_ids.shape[1]
    return {"logits_to_keep": torch.arange(max(0, end - kept), end, device=token_ids.device)}


def _require_no_padding(state: Applied, rows: CacheRows, token_ids: Tensor) -> None:
    """Raise ModelError for padding in a model with recurrent layers: it would enter their states."""
    pass_ = rows.under_way
    assert pass_ is not None
    if not any(spec.recurrent for spec in state.engine.model.layers):
        return
    if sum(len(context.token_ids) for context in pass_.contexts) != token_ids.numel():
        raise ModelError(
            "padding would enter the state of this model's recurrent layers: give rows of equal length, one row at a time, or use "
            "loopserve.Engine, whose sessions may have any lengths"
        )


def _note_media(rows: CacheRows, named: dict[str, Any]) -> None:
    """Remember that what a pass computes is more than its tokens say, so that it cannot be run again."""
    media = [name for name, value in named.items() if name.startswith(_MEDIA) and not _is_empty(value)]
    if media:
        for session in rows.sessions:
            session.repeatable = False


def _is_empty(value: Any) -> bool:
    """Return whether a keyword holds nothing: ``generate`` hands over a dict also where there is no image."""
    return all(_is_empty(each) for each in value.values()) if isinstance(value, dict) else value is None


def _cache_of(state: Applied, cache: Cache | None, count: int) -> tuple[Cache, CacheRows]:
    """Return the cache of a pass and its rows. An empty cache of the caller's is made to hold sessions."""
    engine = state.engine
    rows = rows_of(cache) if cache is not None else None
    if cache is not None and rows is not None:
        if rows.owner is not engine:
            raise ModelError("this cache was made under another stack or model; start without past_key_values")
        if len(rows.sessions) != count:
            raise InputError(f"the cache holds {len(rows.sessions)} rows, the batch has {count}")
        if rows.under_way is not None:
            raise InputError(
                "the last pass over this cache was interrupted, so its layers hold different tokens: start a new cache"
            )
        return cache, rows
    rows = CacheRows([engine.session() for _ in range(count)], engine)
    if cache is None:
        return cache_over(rows, engine.model.layers), rows
    if not isinstance(cache, DynamicCache) or cache.get_seq_length() > 0 or cache.offloading:
        raise ModelError(
            f"{type(cache).__name__} cannot be used under loopserve.apply: start without past_key_values or with an empty "
            "DynamicCache, or go on with the cache that an earlier call under apply returned"
        )
    adopt(cache, rows, engine.model.layers)
    return cache, rows


def _begin(state: Applied, rows: CacheRows, token_ids: Tensor, mask: Tensor | None, positions: Tensor | None) -> Tensor:
    """Open the pass: each row's tokens without padding, and where they stand in its conversation. Returns the position ids."""
    new = token_ids.shape[1]
    valid = _valid(rows, token_ids, mask)
    if positions is None:  # as transformers counts: by columns
        positions = torch.arange(rows.columns, rows.columns + new, device=token_ids.device)
    if positions.dim() == 3 and bool((positions == positions[:1]).all()):
        positions = positions[0]  # kinds of positions that agree, as for text without images
    if positions.dim() > 2:
        raise ModelError(
            f"position_ids {list(positions.shape)} of several kinds that differ (places in an image) are not supported"
        )
    positions = positions.expand(len(token_ids), new)
    spans = []
    for row, session in enumerate(rows.sessions):
        columns = slice(None) if valid is None else valid[row]
        tokens = token_ids[row][columns].tolist()
        if tokens:
            _follow(session, positions[row][columns])
            _keep_rotation(state, session, row, len(tokens))
            spans.append(Span(_context(state, rows, session, tokens, token_ids.device, new), row, columns))
    if not spans:
        raise InputError("attention_mask leaves no token in this pass")
    rows.under_way = Pass(spans)
    rows.prompt_open = not spans[0].context.final
    return positions


def _valid(rows: CacheRows, token_ids: Tensor, mask: Tensor | None) -> Tensor | None:
    """Return which of the new cells hold tokens, bool ``[B, T]``, None if all do. Refuses a mask that changes what is cached."""
    count, new = token_ids.shape
    if mask is None:
        seen = rows.valid
        valid = None
    else:
        if mask.dim() != 2:
            raise ModelError(f"attention_mask must be a 2-D padding mask [rows, tokens], got {list(mask.shape)}")
        if mask.shape[1] not in (new, rows.columns + new):
            raise ModelError(
                f"attention_mask has {mask.shape[1]} columns; the pass has {new} after {rows.columns} cached ones"
            )
        whole = mask.bool()
        valid = whole[:, -new:]
        seen = rows.valid
        if mask.shape[1] > new:
            cached = torch.ones(count, rows.columns, dtype=torch.bool, device=whole.device) if seen is None else seen
            if not torch.equal(whole[:, : rows.columns], cached.to(whole.device)):
                raise ModelError(
                    "attention_mask hides or shows tokens that are cached already in another way than when they were "
                    "computed; start without past_key_values"
                )
    if valid is not None and bool(valid.all()):
        valid = None
    if seen is not None or valid is not None:
        before = torch.ones(count, rows.columns, dtype=torch.bool, device=token_ids.device) if seen is None else seen
        now = torch.ones(count, new, dtype=torch.bool, device=token_ids.device) if valid is None else valid
        rows.valid = torch.cat([before, now.to(before.device)], dim=1)
    return valid


def _follow(session: Any, positions: Tensor) -> None:
    """Require that positions follow each other and those of the tokens before; they may start anywhere (left padding)."""
    seen = session.cache.seen
    offset = int(positions[0]) - seen
    if seen == 0:
        session.position_offset = offset
    expected = torch.arange(seen, seen + len(positions), device=positions.device) + session.position_offset
    if not torch.equal(positions.long(), expected):
        raise ModelError(
            "position_ids must follow each other within a row, and those of the tokens before; a mask with a hole needs "
            "position_ids that count only its tokens"
        )


def _keep_rotation(state: Applied, session: Any, row: int, new: int) -> None:
    """Have a row computed again if its keys are rotated for another length than it will have, as transformers drops its cache."""
    prompt, held = current_prompt(), session.cache.seen
    whole = held + new
    if prompt is not None and prompt.lengths is not None:
        whole = max(whole, prompt.lengths[row])  # a piece of a prompt is rotated as the whole of it
    engine = state.engine
    rotation = engine.model.rotation(whole + session.position_offset)
    in_answer = new == 1 and held > 0
    if held and rotation != session.rotation and not (in_answer and engine.model.rotation_grows):
        engine.compute_anew(session, rotation)
    session.rotation = rotation


def _context(
    state: Applied, rows: CacheRows, session: Any, tokens: list[int], device: torch.device, new: int
) -> ForwardContext:
    """Return the context of a row; its phase is what ``generate`` says, or a turn's start for anything but a single token."""
    seen, prompt = session.cache.seen, current_prompt()
    columns = prompt.columns if prompt is not None else None
    in_prompt = columns is not None if prompt is not None else len(tokens) > 1
    phase = Phase.PREFILL if in_prompt or not seen else Phase.DECODE
    if phase is Phase.DECODE:
        session.tokens.extend(tokens)
        session.stats.output_tokens += 1
    elif rows.prompt_open and session.turns:  # a further piece of the same prompt
        session.tokens.extend(tokens)
        session.stats.prompt_tokens += len(tokens)
    else:
        session.begin_turn(tokens, undoable=False)
    session.enter(phase)
    return ForwardContext(
        session,
        phase,
        tokens,
        torch.arange(seen, seen + len(tokens), device=device),
        stored_after=seen + len(tokens),
        rotation=session.rotation,
        final=columns is None or rows.columns + new >= columns,
        measure=state.engine.measure_coverage,
    )


def _leave(state: Applied) -> Hook:
    def hook(_: torch.nn.Module, __: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        cache = next((kwargs[name] for name in CACHE_KEYWORDS if kwargs.get(name) is not None), None)
        rows = rows_of(cache) if isinstance(cache, Cache) else None
        if rows is None or rows.owner is not state.engine or rows.under_way is None:
            return
        contexts = rows.under_way.contexts
        assert isinstance(cache, Cache)
        save_states(cache, rows.sessions)
        state.rotary.begin(None)
        rows.columns += kwargs["input_ids"].shape[1]
        state.engine.after_pass(contexts)
        rows.under_way = None
        for name in CACHE_KEYWORDS:
            if not rows.kept and getattr(output, name, None) is not None:
                setattr(output, name, None)

    return hook
