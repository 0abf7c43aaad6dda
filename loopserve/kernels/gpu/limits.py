"""What the Triton kernels cannot serve, by the arguments of the operations; known without importing triton."""

from __future__ import annotations

from typing import Any

from torch import Tensor

LARGEST_HEAD = 256  # channels; a wider tile of keys and values does not fit into shared memory
LARGEST_HEAD_FLOAT32 = 128  # float32 takes twice the room, and three products for one
BLOCKS = (16, 32, 64, 128)  # what a tile of a matrix instruction can be cut into
LONGEST = 1 << 21  # columns; distances are kept in the upper bits of an int32


def attention(queries: Tensor, keys: Tensor, values: Tensor, *args: object, **options: object) -> str | None:
    """Of ``dense_attention`` and ``decode_attention``."""
    return _head(queries, max(queries.shape[2], values.shape[2]))


def scores(queries: Tensor, *args: object, **options: object) -> str | None:
    """Of ``line_scores`` and ``token_scores``."""
    return _head(queries, queries.shape[2])


def lines(queries: Tensor, keys: Tensor, values: Tensor, *args: object, **options: object) -> str | None:
    """Of ``vertical_slash``."""
    return attention(queries, keys, values) or (f"more than {LONGEST} columns" if keys.shape[1] > LONGEST else None)


def blocks(queries: Tensor, keys: Tensor, values: Tensor, *args: object, tile: int, **options: object) -> str | None:
    """Of ``block_sparse``."""
    problem = None if tile in BLOCKS else f"tiles other than {', '.join(map(str, BLOCKS))}"
    return attention(queries, keys, values) or problem


def selection(probabilities: Tensor, *args: object, row_floor: float = 0.0, **options: object) -> str | None:
    """Of ``select_lines``."""
    if row_floor > 0:
        return "a floor per row"  # how many rounds it takes is not known beforehand
    return f"more than {LONGEST} columns" if probabilities.shape[2] > LONGEST else None


def choice(queries: Tensor, keys: Tensor, *args: object, **options: Any) -> str | None:
    """Of ``choose_lines``, by the rows that it would make."""
    return scores(queries) or selection(keys[None, 0, :, 0].expand(1, 1, -1), **options)


def _head(queries: Tensor, channels: int) -> str | None:
    most = LARGEST_HEAD_FLOAT32 if queries.element_size() == 4 else LARGEST_HEAD
    return f"heads of more than {most} channels" if channels > most else None
