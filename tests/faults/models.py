"""Tiny random models whose answers depend on every token, and prompts for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from loopserve.api import load_stack
from loopserve.core.engine.engine import TokenEngine
from loopserve.core.engine.sampling import SamplingConfig
from loopserve.core.engine.session import Session
from loopserve.models.bridge import IMPLEMENTATION, TransformersModel
from loopserve.models.layers import set_implementation

VOCABULARY = 120
_BASE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 4096,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_SCALED = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight", "qkv_proj.weight")


def sharpened(model: Any, scale: float = 8.0) -> Any:
    """Scale up the attention weights of a model; its answers run to their full length."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(_SCALED):
                parameter.mul_(scale)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval()


def tiny(kind: str = "llama", **options: Any) -> PreTrainedModel:
    """A random causal language model of a family, float32, the same each time."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**_BASE, **options})
    model: PreTrainedModel = sharpened(AutoModelForCausalLM.from_config(config, dtype=torch.float32))
    return model


def ids(count: int, seed: int = 0) -> Tensor:
    """Random tokens ``[1, count]``."""
    return torch.randint(3, VOCABULARY, (1, count), generator=torch.Generator().manual_seed(seed))


def tokens(count: int, seed: int = 0) -> list[int]:
    """Random tokens as a list."""
    found: list[int] = ids(count, seed)[0].tolist()
    return found


def engine(model: PreTrainedModel, stack: Any = "dense", **options: Any) -> TokenEngine:
    """An engine that has taken the model over."""
    set_implementation(model, IMPLEMENTATION)
    return TokenEngine(TransformersModel(model), load_stack(stack), **options)


def answer(served: TokenEngine, session: Session, prompt: list[int], count: int) -> list[int]:
    """A greedy answer of so many tokens."""
    return list(served.generate(session, prompt, SamplingConfig(max_new_tokens=count)))


def generated(model: Any, prompt: Tensor, count: int, **options: Any) -> list[int]:
    """A greedy answer of so many tokens by ``generate``."""
    found: Tensor = model.generate(input_ids=prompt, max_new_tokens=count, do_sample=False, **options)
    answer: list[int] = found[0, prompt.shape[1] :].tolist()
    return answer
