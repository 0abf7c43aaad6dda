"""vLLM's Triton attention under policies. It never ran on a GPU: tested in Triton's interpreter alone."""

from __future__ import annotations

from typing import Any

from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.attention.backends import triton_attn

from loopserve_vllm import gpu_kernels
from loopserve_vllm.layer import PolicyLayer
from loopserve_vllm.requests import followed


class GPUBackend(triton_attn.TritonAttentionBackend):
    """vLLM's Triton attention backend; with a stack, its layers ask the stack's policies."""

    @staticmethod
    def get_impl_cls() -> type[triton_attn.TritonAttentionImpl]:
        return GPULayer if followed() else triton_attn.TritonAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[triton_attn.TritonAttentionMetadataBuilder]:
        return EagerBuilder if followed() else triton_attn.TritonAttentionMetadataBuilder


class EagerBuilder(triton_attn.TritonAttentionMetadataBuilder):
    _cudagraph_support = AttentionCGSupport.NEVER  # policies run on the host in every layer


class GPULayer(PolicyLayer, triton_attn.TritonAttentionImpl):
    bind, part_of = gpu_kernels.bind, gpu_kernels.part_of

    def fused_output_quant_supported(self, quant_key: Any) -> bool:
        return False  # what policies attend to is written as it is
