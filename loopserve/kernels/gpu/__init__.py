"""What the Triton kernels of several operations share: tile steps, work lists, line sums, launching.

Not an operation. Nothing here imports triton until an operation's ``triton`` module is resolved.
"""
