"""vLLM's CPU attention under policies."""

from __future__ import annotations

from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionBackendImpl

from loopserve_vllm import cpu_kernels
from loopserve_vllm.layer import PolicyLayer
from loopserve_vllm.requests import followed


class CPUBackend(CPUAttentionBackend):
    """vLLM's CPU attention backend; with a stack, its layers ask the stack's policies."""

    @staticmethod
    def get_impl_cls() -> type[CPUAttentionBackendImpl]:
        return CPULayer if followed() else CPUAttentionBackendImpl


class CPULayer(PolicyLayer, CPUAttentionBackendImpl):
    bind, part_of = cpu_kernels.bind, cpu_kernels.part_of
