"""Run transformers models through loopserve's attention.

A model is not patched: its attention implementation is set by name, and the pass under way travels as a keyword argument down to
the attention function. Knows no policy.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from loopserve.core.engine.attention import attend
from loopserve.core.engine.forward import ForwardBatch, ForwardContext, LayerCall
from loopserve.core.errors import ModelError
from loopserve.core.kv.recording import still_plain_tensors
from loopserve.core.policy.layers import LayerSpec
from loopserve.models.cache import CacheRows, Pass, Span, cache_over, computed_in, last_stored
from loopserve.models.carried import Carried
from loopserve.models.layers import cache_keyword, input_device, read_layers, takes_keywords, vocabulary_size
from loopserve.models.llama_steps import llama_steps
from loopserve.models.masks import no_mask
from loopserve.models.recurrent import load_states, save_states
from loopserve.models.rotation import Rotation, longest_conversation

IMPLEMENTATION = "loopserve"
# Keywords that change nothing here: positions are the session's own, and the others choose outputs or caching.
_WITHOUT_EFFECT = frozenset(
    {"position_ids", "cache_position", "use_cache", "output_hidden_states", "output_router_logits", "logits_to_keep"}
)
_MUST_BE_OFF = frozenset({"output_attentions", "head_mask"})


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    loopserve_pass: Pass | None = None,
    **unknown: Any,
) -> tuple[Tensor, None]:
    """Compute the attention of one layer for a pass under way: queries ``[B, Hq, T, D]`` in, ``[B, T, Hq, D]`` out.

    Each keyword a family passes is supported or refused by name; ignoring one would give wrong logits in silence.
    """
    layer: int = module.layer_idx  # type: ignore[assignment]
    under_way = loopserve_pass or last_stored(layer)  # a few families do not hand keywords down to their layers
    if under_way is None:
        raise ModelError(
            "this model is set to loopserve attention: run it through Engine or inside loopserve.apply(model, stack)"
        )
    _refuse(module, unknown, attention_mask, dropout)
    under_way.require_stored(layer, type(module).__name__, key, value)
    spec = under_way.spec(layer)
    query, key, value = computed_in(query, key, value)
    _require_shape(module, spec, query, key, value)
    scaling = scaling if scaling is not None else query.shape[-1] ** -0.5
    window = sliding_window if sliding_window is not None else spec.window
    call = (
        _layer_call(layer, scaling, softcap, window)
        if s_aux is None
        else LayerCall(layer, scaling, softcap, window, s_aux)
    )
    with still_plain_tensors():
        outputs = attend(under_way.contexts, call, under_way.split(query))
        return under_way.join(outputs, query).contiguous(), None


_layer_call = lru_cache(maxsize=4096)(LayerCall)  # those of a model's layers are equal in every step


def _require_shape(module: torch.nn.Module, spec: LayerSpec, query: Tensor, key: Tensor, value: Tensor) -> None:
    """Raise ModelError unless a layer computes what its configuration says, in one dtype."""
    name = type(module).__name__
    if not query.dtype == key.dtype == value.dtype:
        raise ModelError(
            f"layer {spec.index} ({name}) computes queries in {query.dtype}, keys in {key.dtype} and values in {value.dtype}; "
            "loopserve needs one dtype: load the model in one, or run it under torch.autocast"
        )
    found = (query.shape[1], key.shape[1], value.shape[1], query.shape[3], key.shape[3])
    if found != (spec.query_heads, spec.kv_heads, spec.kv_heads, spec.head_dim, spec.head_dim):
        raise ModelError(
            f"layer {spec.index} ({name}) computes {found[0]} query heads of size {found[3]}, {found[1]} key heads of size "
            f"{found[4]} and {found[2]} value heads; its configuration says {spec.query_heads} and {spec.kv_heads} heads of size "
            f"{spec.head_dim}, so this model is not supported"
        )


def _refuse(module: torch.nn.Module, unknown: dict[str, Any], mask: Tensor | None, dropout: float) -> None:
    name = type(module).__name__
    if unknown.pop("is_causal", None) is False or getattr(module, "is_causal", True) is False:
        raise ModelError(f"{name} attends in both directions (is_causal=False); loopserve serves causal attention")
    if dropout:
        raise ModelError(f"{name}: attention dropout is for training; call model.eval() first")
    if mask is not None:
        raise ModelError(
            f"{name}: a custom attention mask ({list(mask.shape)}) is not supported; pass a 2-D padding mask"
        )
    for keyword, value in unknown.items():
        if keyword in _WITHOUT_EFFECT or value is None:
            continue
        if keyword in _MUST_BE_OFF:
            if value is not False:
                raise ModelError(
                    f"{name}: {keyword}={value!r} is not supported, sparse attention has no full weight matrix"
                )
            continue
        raise ModelError(
            f"{name} passes the attention keyword {keyword!r}, which loopserve does not know; "
            "ignoring it would give wrong answers, so this model is not supported"
        )


class TransformersModel:
    """A causal language model of transformers as the engine sees it (``core.engine.forward.Model``)."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self._layers = read_layers(model)
        self._cache_keyword = cache_keyword(model)
        self._takes_pass = takes_keywords(model)
        self.carried = Carried(model, self._layers)
        self._layers = self.carried.layers
        self._one_session = not all(spec.repeatable for spec in self._layers)
        self._slices_rows = any(spec.reads is not None for spec in self._layers)
        config = model.config.get_text_config(decoder=True)
        self._max_positions = longest_conversation(config)
        self.rotary = Rotation(model, config)
        self._steps = llama_steps(model, self._layers) if self.rotary.fixed else None

    @property
    def layers(self) -> Sequence[LayerSpec]:
        """One entry per attention layer, in order."""
        return self._layers

    @property
    def max_positions(self) -> int | None:
        """Longest conversation in tokens; None if the configuration names no limit."""
        return self._max_positions

    @property
    def rotation_grows(self) -> bool:
        """Whether each token is rotated for the length that the conversation has with it (dynamic NTK)."""
        return self.rotary.grows

    def rotation(self, tokens: int) -> int:
        """Return what stands for the rotation of a conversation of so many tokens."""
        return self.rotary.of_length(tokens)

    @property
    def device(self) -> torch.device:
        """Where token ids and positions go."""
        return input_device(self.model)

    @property
    def vocabulary(self) -> int:
        """How many token ids there are."""
        return vocabulary_size(self.model)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of keys and values."""
        dtype: torch.dtype = self.model.dtype
        return dtype

    def forward(self, batch: ForwardBatch) -> Tensor:
        """Run one pass over a packed row of tokens; return the logits of each context's last token, ``[contexts, vocabulary]``.

        A model that carries a state from token to token, or counts positions itself, computes one session after another.
        """
        if self._one_session and len(batch.contexts) > 1:
            return torch.stack([self._alone(context) for context in batch.contexts])
        if self._steps is not None and self._steps.serve(batch.contexts):
            return self._steps.forward(batch)
        contexts, spans = batch.contexts, batch.spans
        rows = CacheRows([each.session for each in contexts])
        rows.columns = contexts[0].session.cache.seen if len(contexts) == 1 else 0
        under_way = Pass([Span(context, 0, span) for context, span in zip(contexts, spans, strict=True)])
        rows.under_way = under_way
        device = self.device
        last = torch.tensor([span.stop - 1 for span in spans], dtype=torch.long, device=device)
        cache = cache_over(rows, self._layers)
        load_states(cache, rows.sessions)
        # A whole number lets gemma 4 compute the last rows alone in layers that read another layer's pairs.
        whole = len(contexts) == 1 and not self._slices_rows
        rotated = nullcontext() if self.rotary.fixed else self.rotary.as_long_as(under_way.rotations(1, spans[-1].stop))
        with torch.no_grad(), rotated, self.carried.token_by_token():
            output = self.model(
                input_ids=batch.token_ids.to(device)[None],
                position_ids=batch.positions[None],
                use_cache=True,
                logits_to_keep=1 if whole else last,
                **{self._cache_keyword: cache},
                **({"loopserve_pass": under_way} if self._takes_pass else {}),
            )
        save_states(cache, rows.sessions)
        logits: Tensor = output.logits[0]
        return logits if len(logits) == len(contexts) else logits[last]

    def _alone(self, context: ForwardContext) -> Tensor:
        """Run one session's share of a pass by itself. Its error stays its own; the logits are zero then."""
        try:
            return self.forward(ForwardBatch([context]))[0]
        except Exception as error:
            context.error = error
            return torch.zeros(self.vocabulary, dtype=self.dtype, device=self.device)
        finally:
            context.isolated = True


AttentionInterface.register(IMPLEMENTATION, attention)
AttentionMaskInterface.register(IMPLEMENTATION, no_mask)
