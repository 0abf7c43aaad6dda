"""Run a loopserve stack inside vLLM: ``LOOPSERVE_STACK=loopserve vllm serve MODEL``."""

from __future__ import annotations

from typing import Any


def register() -> None:
    """Put loopserve in front of vLLM's CPU attention; vLLM calls this in each of its processes.

    Without a stack (LOOPSERVE_STACK, or ``--additional-config '{"loopserve": {"stack": ...}}'``) vLLM's own classes serve. Raises
    ConfigError, when vLLM is configured, for what a stack cannot be combined with.
    """
    from vllm.config import VllmConfig
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    from loopserve_vllm.start import settings

    register_backend(AttentionBackendEnum.CPU_ATTN, "loopserve_vllm.backend.LoopServeBackend")
    configured = VllmConfig.__post_init__
    if getattr(configured, "of_loopserve", False):  # vLLM may call this twice in one process
        return

    def checked(config: Any, *args: Any, **options: Any) -> None:
        configured(config, *args, **options)
        settings(config)

    checked.of_loopserve = True  # type: ignore[attr-defined]
    VllmConfig.__post_init__ = checked


def figures() -> list[dict[str, Any]]:
    """Return the figures of this process's last requests: attended fraction, prefill density, faults, gathers. The oldest first."""
    from loopserve_vllm.requests import Requests

    return Requests.last.figures if Requests.last is not None else []
