"""Try loopserve on a tiny random model of every causal language model family of the installed transformers.

``python -m research.families docs/families.md`` writes the table. A family is exact if, under the stack ``dense``, the logits of a
prompt and of a second pass over its cache are those of transformers within 1e-3; refused if loopserve names the reason. Anything
else is a fault.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import loopserve
from loopserve.models.tiny import DELTA, FAMILIES, LATENT, family_sizes, tiny_model

VOCABULARY = 120
LARGEST = 40_000_000  # parameters: a family that ignores the small sizes is left out
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_group": 1,
    "topk_group": 1,
    "ffn_dim": 64,
    "n_layer": 2,
    "n_head": 4,
    "n_embd": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 64,
    "rotary_dim": 8,
}
# Of the parts that read images and sound: no test runs them, they only have to be small.
MEDIA_SIZES = {
    "hidden_size": 32,
    "embed_dim": 32,
    "d_model": 32,
    "intermediate_size": 32,
    "mlp_dim": 32,
    "num_hidden_layers": 1,
    "num_layers": 1,
    "num_global_layers": 1,
    "encoder_layers": 1,
    "depth": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "attention_heads": 4,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 32,
    "num_heads": 4,
    "head_dim": 8,
    "image_size": 56,
    "patch_size": 14,
    "vision_output_dim": 64,
    "out_hidden_size": 64,
    "output_channels": 32,
    "base_channels": 32,
    "out_channels": 32,
    "num_res_blocks": 1,
}


_RECURRENT_SIZES = {**DELTA, "shared_expert_intermediate_size": 32}
_CONVOLUTION = {"num_hidden_layers": 4, "layer_types": ["conv", "full_attention", "conv", "full_attention"]}
_LATENT_SIZES = {**LATENT, "first_k_dense_replace": 1}
_GROUPED_EXPERTS = {"n_shared_experts": 1, "n_routed_experts": 4, "num_experts_per_tok": 2}
OWN_SIZES: dict[str, dict[str, Any]] = {  # of families that the common sizes do not fit
    "bailing_hybrid": {
        **_LATENT_SIZES,
        "num_hidden_layers": 4,
        "layer_types": ["linear_attention", "full_attention", "linear_attention", "full_attention"],
    },
    "codegen": {"n_head": 4, "rotary_dim": 8, "n_positions": 512},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            each: {"rope_type": "default", "rope_theta": 1e4} for each in ("sliding_attention", "full_attention")
        },
    },
    "dbrx": {
        "d_model": 64,
        "n_heads": 4,
        "n_layers": 2,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "dots1": {**_GROUPED_EXPERTS, "first_k_dense_replace": 1},
    "dots3_note_text": {**_LATENT_SIZES, **_GROUPED_EXPERTS, "index_topk": 8, "index_head_dim": 16, "index_n_heads": 2},
    "git": {"num_hidden_layers": 2, "hidden_size": 64},
    "gpt_neo": {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 16},
    "gptj": {"rotary_dim": 8},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 1},
    "mllama": {"text_config": {**SIZES, "cross_attention_layers": [1]}},
    "plbart": {"encoder_attention_heads": 4, "decoder_attention_heads": 4},
    "qwen4_exp_text": {
        **_RECURRENT_SIZES,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
        "ngram_vocab_size_base": 1000,
        "split_ngram_parts": 4,
        "hc_lowrank": 8,
        "heads_per_ngram": 2,
    },
    "recurrent_gemma": {"num_hidden_layers": 3, "block_types": ["recurrent", "recurrent", "attention"]},
    "reformer": {"is_decoder": True, "axial_pos_embds": False, "attn_layers": ["local", "local"]},
    "whisper": {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "d_model": 64},
    "xlnet": {"d_model": 64, "n_layer": 2, "n_head": 4, "d_inner": 64, "d_head": 16},
    "xlstm": {"num_heads": 4, "num_blocks": 2},
    "xmod": {"default_language": "en_XX", "is_decoder": True},
    "zamba": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
        "attention_head_dim": 32,
        "use_mamba_kernels": False,
        "mamba_d_state": 8,
    },
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 32},
    "qwen3_5_moe_text": _RECURRENT_SIZES,
    "lfm2_moe": {**_CONVOLUTION, "num_dense_layers": 1},
    "lfm3": _CONVOLUTION,
    "minimax": {"layer_types": ["full_attention", "linear_attention"], "block_size": 16},
    "minicpm3": _LATENT_SIZES,
    "youtu": _LATENT_SIZES,
    "axk1": _LATENT_SIZES,
    "axk2": _LATENT_SIZES,
    "longcat_flash": {
        **_LATENT_SIZES,
        "num_layers": 2,
        "ffn_hidden_size": 64,
        "expert_ffn_hidden_size": 32,
        "moe_topk": 2,
    },
    "deepseek_v32": {**_LATENT_SIZES, "index_n_heads": 2, "index_head_dim": 16, "index_topk": 8},
    "glm_moe_dsa": {**_LATENT_SIZES, "index_n_heads": 2, "index_head_dim": 16, "index_topk": 8},
    "zamba2": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
        "mamba_d_state": 8,
        "n_mamba_heads": 8,
        "mamba_ngroups": 1,
        "chunk_size": 16,
        "attention_head_dim": 16,
        "num_mem_blocks": 1,
        "adapter_rank": 8,
    },
}


def _of_fields(known: Any, sizes: dict[str, Any]) -> dict[str, Any]:
    fields = {each.name for each in dataclasses.fields(known)} if dataclasses.is_dataclass(known) else set(sizes)
    fields |= set(known.attribute_map)
    return {name: size for name, size in sizes.items() if name in fields}


def _sizes(kind: str) -> dict[str, Any]:
    """Return small sizes, as far as the configuration of a family and its parts has them."""
    known = CONFIG_MAPPING[kind]
    found = _of_fields(known, SIZES)
    own = OWN_SIZES.get(kind, {})
    for part, type_ in getattr(known, "sub_configs", {}).items():
        if part in own or (type_ is AutoConfig and getattr(known(), part, None) is None):
            continue
        name = getattr(known(), part).model_type if type_ is AutoConfig else type_.model_type
        if part in ("text_config", "decoder"):
            sizes = family_sizes(name) if name in FAMILIES else _sizes(name)
        else:
            sizes = _of_fields(CONFIG_MAPPING[name] if type_ is AutoConfig else type_, MEDIA_SIZES)
        found[part] = {"model_type": name} | sizes
    return found | own


def tiny(kind: str) -> PreTrainedModel | str:
    """Return a random model of a family, or why there is none."""
    torch.manual_seed(0)
    try:
        if kind in FAMILIES:
            return tiny_model(kind)
        config = AutoConfig.for_model(kind, **_sizes(kind))
        with torch.device("meta"):
            shape = AutoModelForCausalLM.from_config(config)
        if sum(each.numel() for each in shape.parameters()) > LARGEST:
            return "its configuration ignores the small sizes"
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        with torch.no_grad():
            for name, weights in model.named_parameters():
                if name.endswith(("q_proj.weight", "k_proj.weight", "qkv_proj.weight")):
                    weights.mul_(8)  # attention that is not flat, so that a wrong one shows
            model(torch.tensor([[3, 4, 5]]))
    except Exception as error:  # another project's code with sizes that it may not expect
        return f"cannot be built with these sizes: {type(error).__name__}"
    return model


def outcome(kind: str) -> tuple[str, str]:
    """Return (exact, refused, not built or FAULT; details) for a family."""
    model = tiny(kind)
    if isinstance(model, str):
        return "not built", model
    ids = torch.randint(3, VOCABULARY - 2, (1, 30), generator=torch.Generator().manual_seed(0))
    try:
        with torch.no_grad():
            plain = model(ids).logits
            with loopserve.apply(model, "dense"):
                error = float((model(ids).logits - plain).abs().max())
                cache = model(ids[:, :20]).past_key_values
                later = model(ids[:, 20:], past_key_values=cache).logits
                error = max(error, float((later - plain[:, 20:]).abs().max()))
    except loopserve.LoopServeError as refusal:
        return "refused", " ".join(str(refusal).split())
    except Exception as failure:  # a raw error is what this script looks for
        return "FAULT", f"{type(failure).__name__}: {' '.join(str(failure).split())[:150]}"
    return ("exact", "") if error < 1e-3 else ("FAULT", f"logits differ by {error:.2g}")


def rows() -> Iterator[tuple[str, str, str]]:
    """Yield family, outcome and details of every family."""
    for kind in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        yield kind, *outcome(kind)


def page(found: list[tuple[str, str, str]], seconds: float) -> str:
    """Return the page of a run."""
    counts = Counter(each[1] for each in found)
    exact = ", ".join(f"`{kind}`" for kind, result, _ in found if result == "exact")
    lines = [
        "# Model families",
        "",
        "Made by `python -m research.families docs/families.md`: a tiny random model of every causal family of transformers",
        f"{version('transformers')}, under the stack `dense`, its logits compared with transformers' own ({seconds:.0f} s, 2 cores).",
        "",
        ", ".join(f"{count} {result}" for result, count in sorted(counts.items())) + ".",
        "",
        f"Exact: {exact}.",
        "",
        "| family | outcome | details |",
        "|---|---|---|",
        *(f"| `{kind}` | {result} | {details} |" for kind, result, details in found if result != "exact"),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("page", type=Path, help="the page to write")
    target = parser.parse_args().page
    warnings.filterwarnings("ignore")
    torch.set_num_threads(2)
    started, found = time.perf_counter(), []
    for row in rows():
        print(" | ".join(row), flush=True)
        found.append(row)
    target.write_text(page(found, time.perf_counter() - started), encoding="utf-8")


if __name__ == "__main__":
    main()
