"""Run a loopserve stack inside vLLM: ``LOOPSERVE_STACK=loopserve vllm serve MODEL``."""

from __future__ import annotations

from typing import Any


def register() -> None:
    """Put loopserve in front of two of vLLM's attention backends; vLLM calls this in each of its processes.

    Without a stack vLLM's own classes serve. What a stack cannot be combined with raises ConfigError when vLLM is configured.
    """
    from vllm.config import VllmConfig
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    from loopserve_vllm.start import settings

    register_backend(AttentionBackendEnum.CPU_ATTN, "loopserve_vllm.cpu.CPUBackend")
    register_backend(AttentionBackendEnum.TRITON_ATTN, "loopserve_vllm.gpu.GPUBackend")
    configured = getattr(VllmConfig.__post_init__, "of_vllm", VllmConfig.__post_init__)  # this may be called twice

    def checked(config: Any, *args: Any, **options: Any) -> None:
        configured(config, *args, **options)
        settings(config)

    checked.of_vllm = configured  # type: ignore[attr-defined]
    VllmConfig.__post_init__ = checked


def figures() -> list[dict[str, Any]]:
    """Return the figures of this process's last requests: attended fraction, prefill density, faults, gathers. The oldest first."""
    from loopserve_vllm.requests import Requests

    return Requests.last.figures if Requests.last is not None else []
