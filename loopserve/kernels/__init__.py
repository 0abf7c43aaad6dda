"""Compute attention and KV selection on plain tensors, one module per operation.

Each module holds one public function of its name, a readable reference and a faster version in plain PyTorch. ``native``
holds the versions in C, ``gpu`` those in Triton. ``backend`` selects the implementation that
serves a call. The package imports nothing else of loopserve.

Tensors belong to one session: queries ``[Hq, Tq, D]``, keys and values ``[Hkv, Tk, D]``. Query head h attends to KV
head h // group. A column is the index of a key. Unless columns are given, query i has column Tk - Tq + i and sees the
columns up to its own.
"""
