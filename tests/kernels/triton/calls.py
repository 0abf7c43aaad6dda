"""Calls that start every kernel in every configuration, to be recorded and compiled; nothing of them is computed."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from pkgutil import walk_packages
from typing import Any

import torch
from torch import Tensor

import loopserve.kernels
from loopserve.kernels import backend
from loopserve.kernels.decode_attention import DecodeRequest
from loopserve.kernels.key_codes import KeyCodes
from loopserve.kernels.paged import Paged

ROWS, TOTAL = 512, 32768  # enough that columns exceed the capacity for packed columns and keys are split
KV_HEADS, GROUP = 2, 4


def heads(dtype: torch.dtype, channels: int, rows: int = ROWS) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of a late turn."""
    keys = torch.zeros(KV_HEADS, TOTAL, channels, dtype=dtype)
    return torch.zeros(KV_HEADS * GROUP, rows, channels, dtype=dtype), keys, torch.zeros_like(keys)


Call = tuple[str, tuple[Any, ...], dict[str, Any]]  # operation, arguments, options


def attention(dtype: torch.dtype, channels: int, **options: Any) -> Iterator[Call]:
    """Every attention and score operation on such heads."""
    queries, keys, values = heads(dtype, channels)
    lines = torch.zeros(KV_HEADS * GROUP, TOTAL, dtype=torch.bool)
    options = {"scaling": 0.1, "softcap": None, "first_valid": None, **options}
    yield "vertical_slash", (queries, keys, values, lines, lines), options
    yield "block_sparse", (queries, keys, values, _blocks(64)), options | {"tile": 64}
    yield "dense_attention", (queries, keys, values), options
    yield "decode_attention", (queries[:, :1], keys, values), options
    if options["first_valid"] is None:
        chosen = {"columns": torch.zeros(KV_HEADS, 2048, dtype=torch.long), "tail": TOTAL - 32}
        yield "decode_attention", (queries[:, :1], keys, values), options | chosen
    batch = {"scaling": options["scaling"], "softcap": options["softcap"]}
    yield "decode_attention_batch", (queries, sessions(queries, keys, values, options["first_valid"])), batch
    yield "line_scores", (queries[:, :64], keys, torch.arange(64)), options


def sessions(
    queries: Tensor, keys: Tensor, values: Tensor, first_valid: Tensor | None, rows: int = 1
) -> list[DecodeRequest]:
    """Decode steps of three lengths, one of them in place; with ``first_valid``, of two."""
    found = [DecodeRequest(queries[:, :rows], keys[:, :total], values[:, :total]) for total in (300, TOTAL)]
    if first_valid is not None:
        return [each._replace(first_valid=first_valid) for each in found]
    columns = torch.zeros(KV_HEADS, 2048, dtype=torch.long)
    return [*found, DecodeRequest(queries[:, :rows], keys, values, None, columns, TOTAL - 32)]


def paged(dtype: torch.dtype, channels: int, size: int = 16) -> Iterator[Call]:
    """Yield the operations that read a store through a block table, over a cache that packs keys and values of a head."""
    queries, _, _ = heads(dtype, channels)
    cache = torch.zeros(TOTAL // size, KV_HEADS, size, 2 * channels, dtype=dtype).transpose(0, 1)
    table = torch.zeros(TOTAL // size, dtype=torch.long)
    keys, values = Paged(cache[..., :channels], table, TOTAL), Paged(cache[..., channels:], table, TOTAL)
    lines = torch.zeros(KV_HEADS * GROUP, TOTAL, dtype=torch.bool)
    options = {"scaling": 0.1, "softcap": None, "first_valid": None}
    chosen = {"columns": torch.zeros(KV_HEADS, 2048, dtype=torch.long), "tail": TOTAL - 32}
    yield "vertical_slash", (queries, keys, values, lines, lines), options
    yield "decode_attention", (queries[:, :1], keys, values), options
    yield "decode_attention", (queries[:, :1], keys, values), options | chosen
    step = DecodeRequest(queries[:, :1], keys, values, None, chosen["columns"], TOTAL - 32)
    yield "decode_attention_batch", (queries, [step, step]), {"scaling": 0.1, "softcap": None}


def variants(dtype: torch.dtype, channels: int) -> Iterator[Call]:
    """Yield what else the same kernels are compiled to, by other options or shapes."""
    queries, keys, values = heads(dtype, channels)
    options = {"scaling": 0.1, "softcap": None, "first_valid": None}
    for tile in (16, 32, 128):
        yield "block_sparse", (queries, keys, values, _blocks(tile)), options | {"tile": tile}
    yield "dense_attention", (queries[:, :64], keys, values), options | {"columns": torch.arange(64)}
    yield "dense_attention", (queries, keys, values), options | {"window": 4096}
    for rows in (4, 16):
        yield "decode_attention", (queries[:, :rows], keys, values), options
    yield "decode_attention", (queries[:, :1], keys[:, :256], values[:, :256]), options
    batch = {"scaling": 0.1, "softcap": None}
    for rows in (4, 32):
        yield "decode_attention_batch", (queries, sessions(queries, keys, values, None, rows)), batch
    short = [DecodeRequest(queries[:, :1], keys[:, :100], values[:, :100])] * 2  # not split
    yield "decode_attention_batch", (queries, short), batch
    chosen = {"columns": torch.zeros(KV_HEADS, 2048, dtype=torch.long), "tail": TOTAL - 32}
    for rows in (4, 32):  # more rows than a tile holds, too
        yield "decode_attention", (queries[:, :rows], keys, values), options | chosen
    for bits in (2, 8):
        yield from coded(dtype, bits)
    for over_rows in ("mean", "max"):
        yield "token_scores", (queries[:, :16], keys, torch.arange(16)), options | {"over_rows": over_rows}


def _blocks(tile: int) -> Tensor:
    return torch.zeros(KV_HEADS * GROUP, -(-ROWS // tile), -(-TOTAL // tile), dtype=torch.bool)


def others() -> Iterator[Call]:
    """Calls whose kernels multiply nothing."""
    _, keys, values = heads(torch.bfloat16, 128)
    yield "gather_kv", (keys, values, torch.zeros(KV_HEADS, 1024, dtype=torch.long)), {}
    probabilities = torch.zeros(2, 64, 4096)
    scores = torch.zeros(KV_HEADS, TOTAL)
    for budget, first_valid in ((1024, None), (40, torch.zeros(KV_HEADS, dtype=torch.long))):
        forced = {"sink_tokens": 4, "recent_window": 64, "first_valid": first_valid}
        yield "top_columns", (scores, budget), forced
    yield from coded(torch.bfloat16, 4)
    options = {"row_weights": torch.ones(2, 64), "row_floor": 0.0, "most_cost": math.inf, "least_weight": 1e-3}
    options |= {"forced": torch.zeros(2, 2, 4096, dtype=torch.bool)}
    yield "select_lines", (probabilities, torch.arange(64), 64), {"alpha": 0.9, "tile": 64, **options}


def coded(dtype: torch.dtype, bits: int) -> Iterator[Call]:
    """Codes made, and read with one query; those of 2 bits without a look at the softmax."""
    queries, keys, _ = heads(dtype, 128, 1)
    low = torch.zeros(KV_HEADS, TOTAL // 32, 128, dtype=dtype)
    codes = torch.zeros(KV_HEADS, TOTAL // 32, 32, 16 * bits, dtype=torch.uint8)
    of = KeyCodes(low, low, codes, bits, TOTAL)
    yield "summarise_pages", (keys, 32, 0, low, low, codes, bits), {}
    base = torch.zeros(KV_HEADS, 900, dtype=torch.long)
    observed = None if bits == 2 else torch.zeros(KV_HEADS, TOTAL - 32)
    yield "code_jumps", (queries, of, base, TOTAL - 32, 124), {"scaling": 0.1, "observed": observed}


def call(operation: str, args: tuple[Any, ...], options: dict[str, Any]) -> Callable[[], object]:
    """The Triton implementation of an operation on these arguments."""
    function = backend.operations()[operation].implementation("triton")
    return lambda: function(*args, **options)


def kernels() -> set[str]:
    """Names of all kernels in the package: functions for the device that are started rather than called from one."""
    found = set()
    for module in walk_packages(loopserve.kernels.__path__, "loopserve.kernels."):
        source = Path(inspect.getfile(import_module(module.name))).read_text() if _has_kernels(module.name) else ""
        found |= {line.split("(")[0].removeprefix("def ") for line in source.splitlines() if _starts_kernel(line)}
    return found


def _has_kernels(module: str) -> bool:
    return ".gpu." in module


def _starts_kernel(line: str) -> bool:
    return line.startswith("def ") and line.split("(")[0].endswith("_kernel")
