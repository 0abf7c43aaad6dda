"""Attention over the active set by the compiled kernel."""

from loopserve.kernels.dense_attention.cpu import dense_attention as decode_attention
from loopserve.kernels.dense_attention.cpu import limit

__all__ = ["decode_attention", "limit"]
