"""Compute a fingerprint of a loaded model and its tokenizer. Models with equal digests give equal answers, up to sampling of
weights.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from transformers import PreTrainedModel

_SAMPLED = 1024  # numbers sampled from each weight; fine-tuning changes almost all of them
_NOT_THE_MODEL = frozenset({"_name_or_path", "transformers_version", "_attn_implementation", "attn_implementation"})


def model_digest(model: PreTrainedModel, tokenizer: Any) -> str:
    """Return 16 hex digits over configuration, weights, vocabulary and chat template.

    Of the weights, all names and shapes and evenly spaced numbers are used.
    """
    digest = hashlib.sha256()
    config = {key: value for key, value in model.config.to_dict().items() if key not in _NOT_THE_MODEL}
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    saved = (
        model.state_dict().keys()
    )  # quantised weights are buffers; buffers that are not saved follow from the configuration
    buffers = [(name, buffer) for name, buffer in model.named_buffers() if name in saved]
    for name, weight in sorted([*model.named_parameters(), *buffers], key=lambda named: named[0]):
        step = max(1, weight.numel() // _SAMPLED)
        numbers = weight.detach().reshape(-1)[::step].float().cpu()
        digest.update(f"{name} {list(weight.shape)} {weight.dtype}".encode() + numbers.numpy().tobytes())
    vocabulary = sorted(tokenizer.get_vocab().items())
    digest.update(json.dumps([vocabulary, tokenizer.chat_template], default=str).encode())
    return digest.hexdigest()[:16]
