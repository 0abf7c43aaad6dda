"""By definition it is dense attention over the active set."""

from loopserve.kernels.dense_attention.reference import dense_attention as decode_attention

__all__ = ["decode_attention"]
