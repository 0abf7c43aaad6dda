"""Dense attention over the active set; a kernel of its own pays where it splits over the keys."""

from loopserve.kernels.dense_attention.packed import dense_attention as decode_attention

__all__ = ["decode_attention"]
