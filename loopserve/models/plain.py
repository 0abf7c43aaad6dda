"""What transformers does on its own, with its own attention and cache: the side we are compared with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from transformers import DynamicCache, PreTrainedModel


def converse(model: PreTrainedModel, prompts: Sequence[Sequence[int]], output_tokens: int) -> list[int]:
    """Answer each prompt greedily with exactly ``output_tokens`` tokens, keeping the cache over the turns."""
    cache = DynamicCache(config=model.config)
    ids: list[int] = []
    answers: list[int] = []
    for prompt in prompts:
        ids += prompt
        batch = torch.tensor([ids], device=model.device)
        with torch.no_grad():
            output = cast("Any", model).generate(
                batch,
                attention_mask=torch.ones_like(batch),
                past_key_values=cache,
                max_new_tokens=output_tokens,
                min_new_tokens=output_tokens,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
        answers += output[0, len(ids) :].tolist()
        ids = output[0].tolist()
    return answers
