"""Describe keys or values that lie in the blocks of a paged cache, for kernels that read them through a block table."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from loopserve.kernels.backend import check_device, check_range


@dataclass(frozen=True, eq=False)
class Paged:
    """Hold rows ``[Hkv, length, D]`` that lie in blocks, in place of a tensor of that shape.

    blocks ``[Hkv, B, size, D]``: a view of all blocks of the cache, with any strides. table int64 ``[length / size or
    more]``: column c is row ``c % size`` of block ``table[c // size]``.
    """

    blocks: Tensor
    table: Tensor
    length: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """Return the shape of the rows: KV heads, length and channels."""
        return self.blocks.shape[0], self.length, self.blocks.shape[3]

    @property
    def size(self) -> int:
        """Return the rows of a block."""
        return self.blocks.shape[2]

    @property
    def dtype(self) -> torch.dtype:
        return self.blocks.dtype

    @property
    def device(self) -> torch.device:
        return self.blocks.device

    def gathered(self) -> Tensor:
        """Return copies of the rows in order: ``[Hkv, length, D]``."""
        used = self.table[: -(-self.length // self.size)]
        return self.blocks[:, used].flatten(1, 2)[:, : self.length]

    def until(self, column: int) -> Paged:
        """Return the rows before a column."""
        return replace(self, length=column)


Rows = Tensor | Paged
"""Keys or values ``[Hkv, n, D]``: one tensor, or in blocks."""


def until(rows: Rows, column: int) -> Rows:
    """Return the rows before a column, without copying them."""
    return rows.until(column) if isinstance(rows, Paged) else rows[:, :column]


def gathered(*parts: Rows) -> tuple[Tensor, ...]:
    """Return each part as one tensor; those in blocks are copied."""
    return tuple(each.gathered() if isinstance(each, Paged) else each for each in parts)


def check_paged(op: str, keys: Rows, values: Rows) -> None:
    """Raise ValueError unless keys and values are both tensors, or in blocks that one valid table lists."""
    if not isinstance(keys, Paged) or not isinstance(values, Paged):
        if isinstance(keys, Paged) or isinstance(values, Paged):
            raise ValueError(f"{op}: keys and values must both be tensors, or both lie in blocks")
        return
    table, size = keys.table, keys.size
    if values.table is not table or values.size != size or values.blocks.shape[1] != keys.blocks.shape[1]:
        raise ValueError(f"{op}: keys and values must lie in the same blocks, listed by the same table")
    if table.dim() != 1 or table.dtype != torch.long or len(table) * size < keys.length or not table.is_contiguous():
        raise ValueError(
            f"{op}: block table {table.dtype} {list(table.shape)} must be int64, contiguous, and list {keys.length} columns in "
            f"blocks of {size}"
        )
    check_device(op, "blocks of the table", table, keys.device)
    if table.device.type == "cpu":  # as for columns: reading it would wait for an accelerator
        check_range(f"{op}: block table", table[: -(-keys.length // size)], keys.blocks.shape[1])
