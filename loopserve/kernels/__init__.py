"""Tensors in, tensors out: one folder per operation, a readable reference in each. Imports nothing of loopserve outside
itself.

One conversation at a time: queries ``[Hq, Tq, D]``, keys and values ``[Hkv, Tk, D]``; query head h reads KV head h //
group. A column is the index of a key; unless columns are given, query i stands at column Tk - Tq + i and sees the
columns up to it. Every operation is a folder with one public function of its name; ``backend`` decides which
implementation serves a call.
"""
