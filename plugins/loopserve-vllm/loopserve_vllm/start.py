"""Read which stack is to be served, and refuse by name, before a model is loaded, what it cannot be combined with."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import vllm
from vllm.platforms import current_platform

from loopserve import ConfigError, load_stack
from loopserve.core.engine.hosted import require_hosted
from loopserve.core.engine.slots import Slots
from loopserve.core.guard.guard import Guard
from loopserve.core.policy.layers import LayerSpec, LayerType

TESTED = ("0.32",)  # of vLLM, major and minor


class Settings(NamedTuple):
    """Hold what all requests of a process share: the policies of each layer, and the guard that checks their calls."""

    stack: str
    slots: Slots
    guard: Guard


_last: tuple[Any, Settings] | None = None  # of the configuration that was asked for last


def settings(config: Any) -> Settings | None:
    """Return what a VllmConfig asks for; None without a stack. Raises ConfigError for what cannot be served, with the remedy."""
    global _last
    if config.model_config is None or (wanted := stack_of(config)) is None:
        return None
    if _last is None or _last[0] is not config:
        if refused := list(_refusals(config)):
            raise ConfigError("\n".join(f"loopserve-vllm: {each}" for each in refused))
        stack = load_stack(wanted)
        slots = require_hosted(stack, _layers(config))
        _last = config, Settings(stack.name, slots, Guard(on_fault="dense", owners=stack.owners))
    return _last[1]


def stack_of(config: Any) -> Any:
    """Return the stack's name, file or dictionary; vLLM's own option before the environment."""
    own = config.additional_config if isinstance(config.additional_config, dict) else {}
    return own.get("loopserve", {}).get("stack") or os.environ.get("LOOPSERVE_STACK") or None


def _layers(config: Any) -> list[LayerSpec]:
    model, parallel = config.model_config, config.parallel_config
    heads = model.get_num_attention_heads(parallel), model.get_num_kv_heads(parallel), model.get_head_size()
    # Not repeatable: vLLM computes no row of a request twice, so policies that ask for it are refused by name.
    numbers = range(model.hf_text_config.num_hidden_layers)
    return [LayerSpec(each, LayerType.FULL, *heads, repeatable=False) for each in numbers]


def _refusals(config: Any) -> Iterator[str]:
    model, parallel, text = config.model_config, config.parallel_config, config.model_config.hf_text_config
    if ".".join(vllm.__version__.split(".")[:2]) not in TESTED:
        yield f"vLLM {vllm.__version__} is not among the versions it was tested with ({', '.join(TESTED)}): install one of them"
    if not current_platform.is_cpu():
        yield (
            f"only vLLM's CPU backend is served, this is {current_platform.device_name}: kernels that read block tables on a GPU are "
            "not written yet; serve it without a stack"
        )
    if config.speculative_config is not None:
        yield "speculative decoding checks several tokens in one step, which no policy selects for: leave out its option"
    if model.use_mla:
        yield "multi-head latent attention (MLA) stores no keys that a policy could choose among: serve it without a stack"
    for kind in ("decode_context", "prefill_context", "pipeline", "tensor"):
        if (ranks := getattr(parallel, f"{kind}_parallel_size", 1)) > 1:
            yield f"{kind}_parallel_size is {ranks}: policies were tested on one rank alone, which holds all pairs; set it to 1"
    if config.kv_transfer_config is not None:
        yield "a KV connector writes pairs that no policy has seen: leave out --kv-transfer-config"
    if (kind := config.cache_config.cache_dtype) not in ("auto", "float32", "bfloat16", "float16"):
        yield f"kv_cache_dtype {kind!r} is quantised, which policies do not read: use auto"
    if config.use_v2_model_runner:
        yield "model runner V2 was not tested: set VLLM_USE_V2_MODEL_RUNNER=0"
    if model.runner_type != "generate":
        yield f"a model that serves {model.runner_type!r} decodes nothing: serve it without a stack"
    others = {each for each in getattr(text, "layer_types", None) or () if each != "full_attention"}
    others |= {"recurrent"} if model.is_hybrid or model.is_attention_free else set()
    others |= {"sliding_attention"} if model.get_sliding_window() is not None else set()
    if others:
        yield f"the model has {', '.join(sorted(others))} layers, policies rule full attention alone: serve it without a stack"
