"""A fingerprint of a loaded model and its tokenizer: equal digests give equal answers, as far as a sample of the weights tells."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from transformers import PreTrainedModel

_SAMPLED = 1024  # numbers of each weight; a fine-tuned model differs in almost all of them
_NOT_THE_MODEL = frozenset({"_name_or_path", "transformers_version", "_attn_implementation", "attn_implementation"})


def model_digest(model: PreTrainedModel, tokenizer: Any) -> str:
    """Sixteen hex digits over configuration, names, shapes and evenly spaced numbers of all weights, vocabulary and chat template."""
    found = hashlib.sha256()
    config = {key: value for key, value in model.config.to_dict().items() if key not in _NOT_THE_MODEL}
    found.update(json.dumps(config, sort_keys=True, default=str).encode())
    for name, weight in sorted(model.named_parameters()):
        step = max(1, weight.numel() // _SAMPLED)
        numbers = weight.detach().reshape(-1)[::step].float().cpu()
        found.update(f"{name} {list(weight.shape)} {weight.dtype}".encode() + numbers.numpy().tobytes())
    vocabulary = sorted(tokenizer.get_vocab().items())
    found.update(json.dumps([vocabulary, tokenizer.chat_template], default=str).encode())
    return found.hexdigest()[:16]
