"""Return what the Triton kernels cannot serve, by the arguments of each operation, without importing triton."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from loopserve.kernels.paged import Paged

if TYPE_CHECKING:
    from collections.abc import Sequence

    from loopserve.kernels.decode_attention import DecodeRequest
    from loopserve.kernels.key_codes import KeyCodes
    from loopserve.kernels.paged import Rows

LARGEST_HEAD = 256  # channels; a wider tile of keys and values does not fit into shared memory
LARGEST_HEAD_FLOAT32 = 128  # float32 needs twice the memory, and three products per product
BLOCKS = (16, 32, 64, 128)  # tile sizes that the matrix instructions support
MOST_ROWS = 64  # of a tile; a maximum over rows is computed within one tile
LONGEST = 1 << 21  # columns; distances are stored in the upper bits of an int32


def attention(queries: Tensor, keys: Rows, values: Rows, *args: object, **options: object) -> str | None:
    """Check ``dense_attention`` and ``decode_attention``; return the reason, or None."""
    return _head(queries, max(queries.shape[2], values.shape[2])) or _blocks(keys) or _blocks(values)


def _blocks(rows: Rows) -> str | None:
    """Check the blocks of keys or values that do not lie in one piece."""
    if isinstance(rows, Paged) and (rows.blocks.stride(3) != 1 or rows.size & (rows.size - 1)):
        return f"blocks of {rows.size} rows, whose channels are {rows.blocks.stride(3)} numbers apart"
    return None


def decode_batch(queries: Tensor, requests: Sequence[DecodeRequest], **options: object) -> str | None:
    """Check ``decode_attention_batch``, whose requests agree in head sizes."""
    found = (attention(queries, each.keys, each.values) for each in requests)
    return next((problem for problem in found if problem is not None), None)


def scores(queries: Tensor, *args: object, **options: object) -> str | None:
    """Check ``line_scores`` and ``token_scores``."""
    return _head(queries, queries.shape[2])


def lines(queries: Tensor, keys: Rows, values: Rows, *args: object, **options: object) -> str | None:
    """Check ``vertical_slash``."""
    return attention(queries, keys, values) or (f"more than {LONGEST} columns" if keys.shape[1] > LONGEST else None)


def blocks(queries: Tensor, keys: Tensor, values: Tensor, *args: object, tile: int, **options: object) -> str | None:
    """Check ``block_sparse``."""
    problem = None if tile in BLOCKS else f"tiles other than {', '.join(map(str, BLOCKS))}"
    return attention(queries, keys, values) or problem


def selection(probabilities: Tensor, *args: object, row_floor: float = 0.0, **options: object) -> str | None:
    """Check ``select_lines``."""
    if row_floor > 0:
        return "a floor per row"  # the number of rounds is not known before the call
    return f"more than {LONGEST} columns" if probabilities.shape[2] > LONGEST else None


def choice(queries: Tensor, keys: Tensor, *args: object, **options: Any) -> str | None:
    """Check ``choose_lines`` by the size of its softmax rows."""
    return scores(queries) or selection(keys[None, 0, :, 0].expand(1, 1, -1), **options)


def summaries(
    keys: Tensor, page: int, first: int, low: Tensor, high: Tensor, codes: Tensor | None, bits: int
) -> str | None:
    """Check ``summarise_pages``."""
    if bits == 2 and codes is not None and keys.shape[1] >= (first + 1) * page:
        return "whole pages of 2 bits, whose bounds are fitted"
    return _pages(low, high, low if codes is None else codes)


def codes(queries: Tensor, of: KeyCodes, *_: object, **__: object) -> str | None:
    """Check ``code_logits``."""
    return _pages(of.low, of.high, of.codes)


def jumps(queries: Tensor, of: KeyCodes, *_: object, observed: Tensor | None, **__: object) -> str | None:
    """Check ``code_jumps``."""
    if queries.shape[0] // len(of.low) * queries.shape[1] > MOST_ROWS:
        return f"more than {MOST_ROWS} rows for a head"
    if observed is not None and observed.stride(1) != 1:
        return "observations that do not lie side by side"
    return codes(queries, of)


def _pages(low: Tensor, high: Tensor, codes: Tensor) -> str | None:
    if low.dtype != high.dtype or low.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"bounds in {low.dtype} and {high.dtype}"
    if low.stride() != high.stride() or not (low[0].is_contiguous() and codes[0].is_contiguous()):
        return "pages that do not lie side by side"
    return None


def _head(queries: Tensor, channels: int) -> str | None:
    most = LARGEST_HEAD_FLOAT32 if queries.element_size() == 4 else LARGEST_HEAD
    return f"heads of more than {most} channels" if channels > most else None
