"""Write a trained model as a folder that transformers loads: weights, config, tokenizer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from shutil import rmtree

import torch
from safetensors.torch import save_file
from torch import Tensor

from research.training.batches import IDS, SPECIAL_WORDS, WORDS
from research.training.model import RecallLlama

WINDOW = 8192

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '<user> ' + message['content'] + ' ' }}"
    "{% elif message['role'] == 'assistant' %}{{ '<assistant> ' + message['content'] + ' <eot>' }}"
    "{% else %}{{ raise_exception('only the roles user and assistant are known') }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


def weights(model: RecallLlama) -> dict[str, Tensor]:
    """The training model's parameters under transformers' names, in float16."""
    found = {"model.embed_tokens.weight": model.embedding, "model.norm.weight": model.norm}
    names = {
        "q": "self_attn.q_proj",
        "k": "self_attn.k_proj",
        "v": "self_attn.v_proj",
        "o": "self_attn.o_proj",
        "gate": "mlp.gate_proj",
        "up": "mlp.up_proj",
        "down": "mlp.down_proj",
        "input_norm": "input_layernorm",
        "post_norm": "post_attention_layernorm",
    }
    for index, layer in enumerate(model.layers):
        for ours, theirs in names.items():
            found[f"model.layers.{index}.{theirs}.weight"] = layer.get_parameter(ours)
    return {name: value.detach().to(torch.float16).contiguous().clone() for name, value in found.items()}


def config(model: RecallLlama) -> dict[str, object]:
    """config.json of transformers' LlamaForCausalLM."""
    shape = model.shape
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_hidden_layers,
        "num_attention_heads": shape.num_attention_heads,
        "num_key_value_heads": shape.num_key_value_heads,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": WINDOW,
        "rms_norm_eps": shape.rms_norm_eps,
        "rope_theta": shape.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_theta},
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": IDS["<bos>"],
        "eos_token_id": IDS["<eot>"],
        "pad_token_id": IDS["<pad>"],
        "dtype": "float16",
    }


def save_tokenizer(folder: Path) -> None:
    """A word-level tokenizer: lower case, split at white space and punctuation, one id a word."""
    from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel(dict(IDS), unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    tokenizer.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in SPECIAL_WORDS])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<bos>",
        "eos_token": "<eot>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "additional_special_tokens": ["<user>", "<assistant>"],
        "clean_up_tokenization_spaces": False,
        "model_max_length": WINDOW,
        "padding_side": "left",
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def export(model: RecallLlama, folder: Path, notes: Mapping[str, object]) -> None:
    """Write the folder whole: a reader sees the old one or the new one, save for the instant of the swap."""
    new, old = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
    rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    save_file(weights(model), new / "model.safetensors", metadata={"format": "pt"})
    (new / "model.safetensors").chmod(0o644)  # safetensors creates it for the owner alone
    generation = {"bos_token_id": IDS["<bos>"], "eos_token_id": IDS["<eot>"], "pad_token_id": IDS["<pad>"]}
    (new / "config.json").write_text(json.dumps(config(model), indent=2) + "\n")
    (new / "generation_config.json").write_text(json.dumps({**generation, "do_sample": False}, indent=2) + "\n")
    (new / "training.json").write_text(json.dumps({**notes, "words": len(WORDS)}, indent=2) + "\n")
    save_tokenizer(new)
    rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    rmtree(old, ignore_errors=True)
