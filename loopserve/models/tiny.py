"""Make tiny random models of many families for tests. They need no download, and show whether a keyword is ignored.

Queries and keys are scaled up so that attention is peaked. A dropped softcap, sink or window then changes the logits visibly.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCABULARY = 160
WINDOW = 24
_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 1024,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "mistral_window": {"model_type": "mistral", "sliding_window": WINDOW},
    "qwen2": {},
    "qwen3": {},
    "qwen3_moe": {"num_experts": 4, **_MOE},
    "phi3": {"hidden_size": 64, "sliding_window": None},
    "gemma2": {"sliding_window": WINDOW, "attn_logit_softcapping": 5.0, "query_pre_attn_scalar": 16},
    "gemma3_text": {"sliding_window": WINDOW, "sliding_window_pattern": 3, "query_pre_attn_scalar": 16},
    "olmo2": {},
    "granite": {"attention_multiplier": 0.4},
    "smollm3": {},
    "glm4": {},
    "starcoder2": {"sliding_window": None},
    "gpt_oss": {
        "sliding_window": WINDOW,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    },
}


def tiny_model(family: str, seed: int = 0) -> PreTrainedModel:
    """Return a random model of ``family`` (a key of FAMILIES), float32, in evaluation mode, the same for the same seed."""
    options = {"model_type": family, **_COMMON, **FAMILIES[family]}
    config = AutoConfig.for_model(options.pop("model_type"), **options)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                parameter.mul_(10.0)
            elif name.endswith(("v_proj.weight", "o_proj.weight")):
                parameter.mul_(6.0)
            elif name.endswith("qkv_proj.weight"):
                parameter.mul_(8.0)
            elif name.endswith("sinks"):
                parameter.normal_(0.0, 2.0)
    model.generation_config.eos_token_id = None  # answers run to their full length, so that every token is compared
    loaded: PreTrainedModel = model.eval()
    return loaded
