"""Share code between the Triton kernels of several operations: tile steps, work lists, line sums, launching.

This is not an operation. Triton is imported only when the ``triton`` module of an operation is resolved.
"""
