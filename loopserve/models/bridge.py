"""Run transformers models through loopserve's attention.

A model is not patched: its attention implementation is set by name, and the pass under way travels as a keyword argument down to
the attention function. Knows no policy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_utils import AttentionInterface

from loopserve.core.engine.attention import LayerCall, attend
from loopserve.core.engine.forward import ForwardBatch
from loopserve.core.errors import ModelError
from loopserve.core.policy.interfaces import LayerSpec
from loopserve.models.cache import CacheRows, Pass, Span, cache_over
from loopserve.models.layers import read_layers

IMPLEMENTATION = "loopserve"
# Keywords that change nothing here: positions are the session's own, and the others choose outputs or caching.
_WITHOUT_EFFECT = frozenset(
    {"position_ids", "cache_position", "use_cache", "is_causal", "output_router_logits", "logits_to_keep"}
)
_MUST_BE_OFF = frozenset({"output_attentions", "output_hidden_states", "head_mask"})


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
    if loopserve_pass is None:
        raise ModelError(
            "this model is set to loopserve attention: run it through Engine or inside loopserve.apply(model, stack)"
        )
    _refuse(module, unknown, attention_mask, dropout)
    loopserve_pass.require_stored(layer, type(module).__name__, key, value)
    spec = loopserve_pass.contexts[0].session.slots.by_layer[layer].spec
    call = LayerCall(
        layer,
        scaling=scaling if scaling is not None else query.shape[-1] ** -0.5,
        softcap=softcap,
        window=sliding_window if sliding_window is not None else spec.window,
        sinks=s_aux,
    )
    outputs = attend(loopserve_pass.contexts, call, loopserve_pass.split(query))
    return loopserve_pass.join(outputs, query).contiguous(), None


def _refuse(module: torch.nn.Module, unknown: dict[str, Any], mask: Tensor | None, dropout: float) -> None:
    name = type(module).__name__
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

    @property
    def layers(self) -> Sequence[LayerSpec]:
        """One entry per attention layer, in order."""
        return self._layers

    @property
    def max_positions(self) -> int | None:
        """Longest conversation in tokens; None if the configuration names no limit."""
        return getattr(self.model.config.get_text_config(decoder=True), "max_position_embeddings", None)

    @property
    def device(self) -> torch.device:
        """Where token ids and positions go."""
        device: torch.device = self.model.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """What keys and values are stored in."""
        dtype: torch.dtype = self.model.dtype
        return dtype

    def forward(self, batch: ForwardBatch) -> Tensor:
        """Run one pass over a packed row of tokens; return the logits of each context's last token, ``[contexts, vocabulary]``."""
        contexts, spans = batch.contexts, batch.spans
        rows = CacheRows([each.session for each in contexts])
        rows.columns = contexts[0].session.cache.seen if len(contexts) == 1 else 0
        under_way = Pass([Span(context, 0, span) for context, span in zip(contexts, spans, strict=True)])
        rows.under_way = under_way
        last = torch.tensor([span.stop - 1 for span in spans], dtype=torch.long, device=self.device)
        with torch.no_grad():
            output = self.model(
                input_ids=batch.token_ids.to(self.device)[None],
                position_ids=batch.positions[None],
                past_key_values=cache_over(rows, len(self._layers)),
                use_cache=True,
                logits_to_keep=1 if len(contexts) == 1 else last,
                loopserve_pass=under_way,
            )
        logits: Tensor = output.logits[0]
        return logits if len(logits) == len(contexts) else logits[last]


AttentionInterface.register(IMPLEMENTATION, attention)
