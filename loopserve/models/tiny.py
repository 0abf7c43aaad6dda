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
_GROUPED_MOE = {**_MOE, "n_routed_experts": 4, "num_experts": 4, "n_group": 1, "topk_group": 1}
_MAMBA = {
    "mamba_n_heads": 8,
    "mamba_d_head": 12,
    "mamba_n_groups": 1,
    "mamba_d_state": 8,
    "mamba_expand": 2,
    "mamba_chunk_size": 16,
}
DELTA = {
    "num_hidden_layers": 4,
    "layer_types": ["linear_attention", "linear_attention", "full_attention", "linear_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
LATENT = {
    "kv_lora_rank": 24,
    "q_lora_rank": 20,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "head_dim": 8,
    "num_key_value_heads": 4,
}
_SHARED = {  # the last two layers read the pairs of the third and fourth
    "num_hidden_layers": 6,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 3,
    "sliding_window": WINDOW,
    "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": VOCABULARY,
}
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
    "gemma3n_text": {
        **_SHARED,
        "intermediate_size": [64] * 6,
        "activation_sparsity_pattern": [0.0] * 6,
        "laurel_rank": 8,
        "altup_num_inputs": 2,
    },
    "gemma4_text": {**_SHARED, "global_head_dim": 32},
    "llama4_text": {
        "num_hidden_layers": 4,
        "layer_types": ["chunked_attention", "chunked_attention", "chunked_attention", "full_attention"],
        "attention_chunk_size": WINDOW,
        "no_rope_layers": [1, 1, 1, 0],
        "floor_scale": 16,
        "intermediate_size_mlp": 64,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 2,
    },
    "deepseek_v2": {**LATENT, **_GROUPED_MOE, "first_k_dense_replace": 1},
    "deepseek_v3": {**LATENT, **_GROUPED_MOE, "first_k_dense_replace": 1},
    "glm4_moe_lite": {**LATENT, **_GROUPED_MOE, "first_k_dense_replace": 1},
    "lfm2": {"num_hidden_layers": 4, "layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "qwen3_next": {**DELTA, **_MOE, "num_experts": 4, "shared_expert_intermediate_size": 32},
    "qwen3_5_text": DELTA,
    "olmo_hybrid": DELTA,
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp", "linear_attention"],
        "mamba_num_heads": 8,
        "mamba_head_dim": 12,
        "n_groups": 1,
        "ssm_state_size": 8,
        "chunk_size": 16,
        "moe_shared_expert_intermediate_size": 32,
        **_GROUPED_MOE,
    },
    "granitemoehybrid": {
        "num_hidden_layers": 4,
        "layer_types": ["linear_attention", "full_attention", "linear_attention", "full_attention"],
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 32,
        **_MAMBA,
    },
    "bamba": {"num_hidden_layers": 4, "attn_layer_indices": [1, 3], **_MAMBA},
    "falcon_h1": {"mamba_d_ssm": 96, **_MAMBA},
    "jamba": {
        "num_hidden_layers": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "mamba_d_state": 8,
        "mamba_expand": 2,
        "mamba_dt_rank": 4,
    },
    "kimi_linear": {
        **LATENT,
        **_GROUPED_MOE,
        "num_hidden_layers": 4,
        "layer_types": ["linear_attention", "linear_attention", "full_attention", "linear_attention"],
        "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
        "linear_num_heads": 4,
        "linear_head_dim": 16,
    },
    "gpt2": {"n_layer": 3, "n_head": 4, "n_embd": 48, "num_key_value_heads": 4, "head_dim": 12},
    "gpt_neox": {"num_key_value_heads": 4, "head_dim": 12},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 48, "num_key_value_heads": 4, "head_dim": 12},
}
RECURRENT = (  # families with layers that keep a recurrent or convolution state
    "bamba",
    "falcon_h1",
    "granitemoehybrid",
    "jamba",
    "kimi_linear",
    "lfm2",
    "nemotron_h",
    "olmo_hybrid",
    "qwen3_5_text",
    "qwen3_next",
)


def family_sizes(family: str) -> dict[str, Any]:
    """Return the configuration of the tiny model of ``family`` (a key of FAMILIES)."""
    return {"model_type": family, **_COMMON, **FAMILIES[family]}


def tiny_model(family: str, seed: int = 0) -> PreTrainedModel:
    """Return a random model of ``family`` (a key of FAMILIES), float32, in evaluation mode, the same for the same seed."""
    options = family_sizes(family)
    config = AutoConfig.for_model(options.pop("model_type"), **options)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("q_proj.weight", "q_b_proj.weight", "k_proj.weight")):
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
