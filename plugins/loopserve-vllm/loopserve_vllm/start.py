"""Read which stack is to be served, and refuse by name, before a model is loaded, what it cannot be combined with."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import vllm
from vllm.platforms import current_platform

from loopserve import ConfigError, load_stack
from loopserve.core.engine.hosted import require_hosted
from loopserve.core.engine.slots import Slots
from loopserve.core.guard.guard import Guard
from loopserve.core.policy.layers import LayerSpec, LayerType

TESTED = "0.32"  # of vLLM, major and minor
DTYPES = ("auto", "float32", "bfloat16", "float16")  # of its cache


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
        if refused := [text for text, applies in _refusals(config).items() if applies]:
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
    count = model.hf_text_config.num_hidden_layers
    return [LayerSpec(each, LayerType.FULL, *heads, repeatable=False) for each in range(count)]


def _refusals(config: Any) -> dict[str, bool]:
    """Return the reasons not to serve a configuration, with what to do, and whether they apply."""
    model, parallel, attention = config.model_config, config.parallel_config, config.attention_config
    platform, dtype = current_platform, config.cache_config.cache_dtype
    triton = getattr(attention.backend, "name", "") == "TRITON_ATTN" and not attention.backend_per_kind
    names = [f"{each}_parallel_size" for each in ("decode_context", "prefill_context", "pipeline", "tensor")]
    ranks = ", ".join(f"{each} is {size}" for each in names if (size := getattr(parallel, each, 1)) > 1)
    others = {each for each in getattr(model.hf_text_config, "layer_types", None) or () if each != "full_attention"}
    others |= {"recurrent"} if model.is_hybrid or model.is_attention_free else set()
    others |= {"sliding_attention"} if model.get_sliding_window() is not None else set()
    types, runner, speculative = ", ".join(sorted(others)), model.runner_type, config.speculative_config is not None
    return {
        f"vLLM {vllm.__version__} was not tested: install {TESTED}": not vllm.__version__.startswith(f"{TESTED}."),
        f"{platform.device_name} was not tested: use a CPU or CUDA": not (platform.is_cpu() or platform.is_cuda()),
        "a GPU, where it never ran so far, needs --attention-backend TRITON_ATTN": platform.is_cuda() and not triton,
        "asynchronous scheduling was not tested: set --no-async-scheduling": config.scheduler_config.async_scheduling,
        "micro-batches take requests apart: leave out --enable-dbo and --ubatch-size": parallel.use_ubatching,
        "speculative decoding checks several tokens in one step: leave out its option": speculative,
        "MLA stores no keys that a policy could choose among: serve it without a stack": model.use_mla,
        f"{ranks}: policies were tested on one rank alone, which holds all pairs; set it to 1": bool(ranks),
        "a KV connector writes pairs unseen by policies: leave out its option": config.kv_transfer_config is not None,
        f"kv_cache_dtype {dtype!r} is quantised, which policies do not read: use auto": dtype not in DTYPES,
        "model runner V2 was not tested: set VLLM_USE_V2_MODEL_RUNNER=0": config.use_v2_model_runner,
        f"a model that serves {runner!r} decodes nothing: serve it without a stack": runner != "generate",
        f"the model has {types} layers, policies rule full attention alone: serve it without a stack": bool(others),
    }
