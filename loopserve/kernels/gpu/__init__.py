"""Implement the operations in Triton.

Triton is imported only when the implementation of an operation is resolved. ``limits`` and ``launch`` do not need it.
"""
