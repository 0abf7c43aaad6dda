"""Follow ``model.generate`` through its prompt, so that the phase of a pass is known and not guessed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from loopserve.models.cache import CacheRows

CACHE_KEYWORDS = ("past_key_values", "cache")  # of a model's forward; the second from transformers 5.24 on


@dataclass
class GeneratePrompt:
    """Hold what ``generate`` computes in this thread: its prompt, of so many columns in all, or its answer (None)."""

    columns: int | None = None
    rows: CacheRows | None = None  # those of its last pass
    lengths: list[int] | None = None  # tokens of each row once the prompt is computed


_prompt: ContextVar[GeneratePrompt | None] = ContextVar("loopserve_prompt", default=None)


def current_prompt() -> GeneratePrompt | None:
    """Return what the ``generate`` under way in this thread computes; None outside of one."""
    return _prompt.get()


@contextmanager
def prompts_announced(model: PreTrainedModel) -> Iterator[None]:
    """Have ``model.generate`` say when it computes its prompt, so that the phase of a pass is known and not guessed."""
    served: Any = model
    generate, prefill = served.generate, served._prefill

    def announced_generate(*args: Any, **kwargs: Any) -> Any:
        token = _prompt.set(GeneratePrompt())
        try:
            return generate(*args, **kwargs)
        finally:
            _prompt.reset(token)

    def announced_prefill(
        input_ids: Tensor, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        prompt = _prompt.get()
        if prompt is None:
            return prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)
        prompt.columns = _prompt_columns(input_ids, model_kwargs)
        mask = model_kwargs.get("attention_mask")
        prompt.lengths = None if mask is None or mask.dim() != 2 else mask.bool().sum(1).tolist()
        try:
            return prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)
        finally:
            prompt.columns = prompt.lengths = None

    served.generate, served._prefill = announced_generate, announced_prefill
    try:
        yield
    finally:
        del served.generate, served._prefill


def _prompt_columns(input_ids: Tensor, model_kwargs: dict[str, Any]) -> int:
    """Return the columns that the cache holds once the prompt is computed. The caller may give the whole input, or its end."""
    mask = model_kwargs.get("attention_mask")
    cache = next((model_kwargs[name] for name in CACHE_KEYWORDS if model_kwargs.get(name) is not None), None)
    given = input_ids.shape[1]
    held = cache.get_seq_length() if cache is not None else 0
    whole = mask.shape[1] if mask is not None else given
    return whole if whole > held else held + given
