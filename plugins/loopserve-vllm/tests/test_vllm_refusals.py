"""Whatever a stack cannot be combined with is refused by name when vLLM is configured, before a model is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from loopserve_vllm import register, start
from loopserve_vllm.start import settings, stack_of
from vllm.engine.arg_utils import EngineArgs

from loopserve import ConfigError
from loopserve.models.demo import bundled_path

SNAPKV = {"policy": "snapkv", "budget": 64}


def config(stack: Any, **changed: Any) -> Any:
    """Return the part of vLLM's configuration that the checks look at, as far as the checks look at it: the bundled model on a CPU."""
    text = SimpleNamespace(num_hidden_layers=4, layer_types=changed.pop("layer_types", None))
    model = {
        "hf_text_config": text, "use_mla": False, "runner_type": "generate", "is_hybrid": False, "is_attention_free": False,
        "dtype": "torch.float32", "get_sliding_window": lambda: None, "get_num_attention_heads": lambda _: 4,
        "get_num_kv_heads": lambda _: 2, "get_head_size": lambda: 64,
    }  # fmt: skip
    parallel = dict.fromkeys(
        (
            "pipeline_parallel_size",
            "tensor_parallel_size",
            "decode_context_parallel_size",
            "prefill_context_parallel_size",
        ),
        1,
    ) | {"use_ubatching": False}
    whole = {
        "additional_config": {"loopserve": {"stack": stack}}, "speculative_config": None, "kv_transfer_config": None,
        "cache_config": SimpleNamespace(cache_dtype="auto"), "use_v2_model_runner": False,
        "scheduler_config": SimpleNamespace(async_scheduling=False),
        "attention_config": SimpleNamespace(backend=None, backend_per_kind={}),
    }  # fmt: skip
    for name, value in changed.items():
        next(each for each in (model, parallel, whole) if name in each)[name] = value
    return SimpleNamespace(model_config=SimpleNamespace(**model), parallel_config=SimpleNamespace(**parallel), **whole)


def decode(**options: Any) -> dict[str, Any]:
    return {"prefill": {"policy": "dense"}, "decode": options}


REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "a stack that evicts": (decode(**SNAPKV, retention="evict"), {}, r"'snapkv' evicts .* set its retention to keep"),
    "rows computed again": (decode(policy="loopserve"), {}, r"'loopserve' .* computed again"),
    "kvzip": (decode(policy="kvzip"), {}, r"'kvzip' .* computed again"),
    "output weight": (decode(policy="criticalkv", inner=SNAPKV), {}, r"needs the layer's output_weight"),
    "rotary": (decode(policy="expected_attention"), {}, r"needs the layer's rotary"),
    "unknown stack": ("loopsurve", {}, r"unknown stack 'loopsurve'.*loopserve"),
    "speculative decoding": ("loopserve", {"speculative_config": object()}, "speculative decoding"),
    "MLA": ("loopserve", {"use_mla": True}, "MLA"),
    "context parallel": ("loopserve", {"decode_context_parallel_size": 2}, "decode_context_parallel_size is 2"),
    "prefill context parallel": ("loopserve", {"prefill_context_parallel_size": 2}, "prefill_context_parallel_size is 2"),
    "tensor parallel": ("loopserve", {"tensor_parallel_size": 2}, "tensor_parallel_size is 2"),
    "pipeline parallel": ("loopserve", {"pipeline_parallel_size": 2}, "pipeline_parallel_size is 2"),
    "micro-batches": ("loopserve", {"use_ubatching": True}, "leave out --enable-dbo"),
    "asynchronous": ("loopserve", {"scheduler_config": SimpleNamespace(async_scheduling=True)}, "--no-async-scheduling"),
    "KV connector": ("loopserve", {"kv_transfer_config": object()}, "KV connector"),
    "quantised cache": ("loopserve", {"cache_config": SimpleNamespace(cache_dtype="fp8")}, "'fp8' is quantised"),
    "runner V2": ("loopserve", {"use_v2_model_runner": True}, "VLLM_USE_V2_MODEL_RUNNER=0"),
    "pooling": ("loopserve", {"runner_type": "pooling"}, "'pooling' decodes nothing"),
    "sliding layers": ("loopserve", {"layer_types": ["full_attention", "sliding_attention"]}, "has sliding_attention layers"),
    "one window": ("loopserve", {"get_sliding_window": lambda: 128}, "has sliding_attention layers"),
    "recurrent layers": ("loopserve", {"is_hybrid": True}, "has recurrent layers"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_it_is_refused_by_name(case: str) -> None:
    stack, changed, said = REFUSED[case]
    with pytest.raises(ConfigError, match=f"(?s){said}"):
        settings(config(stack, **changed))


def test_another_version_and_another_platform_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start.vllm, "__version__", "0.99.1")
    monkeypatch.setattr(start, "current_platform", platform("xpu"))
    with pytest.raises(ConfigError) as refused:
        settings(config("loopserve"))
    assert "vLLM 0.99.1 was not tested: install 0.32" in str(refused.value)
    assert "xpu was not tested: use a CPU or CUDA" in str(refused.value)


def platform(name: str) -> SimpleNamespace:
    return SimpleNamespace(is_cpu=lambda: name == "cpu", is_cuda=lambda: name == "cuda", device_name=name)


def test_a_gpu_is_served_by_the_backend_that_was_named_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start, "current_platform", platform("cuda"))
    triton, flash = (SimpleNamespace(name=name) for name in ("TRITON_ATTN", "FLASH_ATTN"))
    for backend, per_kind in ((None, {}), (flash, {}), (triton, {"full_attention": flash})):
        attention = SimpleNamespace(backend=backend, backend_per_kind=per_kind)
        with pytest.raises(
            ConfigError, match="a GPU, where it never ran so far, needs --attention-backend TRITON_ATTN"
        ):
            settings(config("loopserve", attention_config=attention))
    attention = SimpleNamespace(backend=triton, backend_per_kind={})
    assert settings(config("loopserve", attention_config=attention)) is not None


def test_a_stack_is_named_by_the_option_or_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOOPSERVE_STACK", raising=False)
    assert settings(config(None)) is None
    monkeypatch.setenv("LOOPSERVE_STACK", "snapkv")
    assert stack_of(config(None)) == "snapkv" and stack_of(config("dense")) == "dense"
    served = settings(config("dense"))
    assert served is not None and served.stack == "dense"


def engine_config(path: Path | str, stack: Any, **options: Any) -> Any:
    register()
    given = {"additional_config": {"loopserve": {"stack": stack}}} if stack is not None else {}
    return EngineArgs(str(path), skip_tokenizer_init=True, dtype="float32", **given, **options).create_engine_config()


def test_vllm_itself_refuses_when_it_is_configured(tmp_path: Path) -> None:
    """The same checks through vLLM's own configuration, so that the fields they read are there."""
    assert engine_config(bundled_path(), "loopserve") is not None
    assert engine_config(bundled_path(), None) is not None
    with pytest.raises(ConfigError, match="evicts pairs"):
        engine_config(bundled_path(), decode(**SNAPKV, retention="evict"))
    ngram = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}
    with pytest.raises(ConfigError, match="speculative decoding"):
        engine_config(bundled_path(), "loopserve", speculative_config=ngram)
    with pytest.raises(ConfigError, match="tensor_parallel_size is 2"):
        engine_config(bundled_path(), "loopserve", tensor_parallel_size=2)
    sliding = {
        "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "hidden_size": 64, "intermediate_size": 64,
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "vocab_size": 64,
        "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"], "max_position_embeddings": 512,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(sliding))
    with pytest.raises(ConfigError, match="has sliding_attention layers"):
        engine_config(tmp_path, "loopserve")
