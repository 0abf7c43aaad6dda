"""Call the compiled parts of a decoder layer of Llama's form around its attention, for the few rows of a decode step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from ctypes import Structure, byref, c_float, c_int64, c_void_p, memmove
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from loopserve.kernels.native import library
from loopserve.kernels.native.library import address, optional, places

NUMBERS = 1 << 16  # the bfloat16 numbers, by which an activation is tabulated
_KIND = torch.bfloat16


class LayerWeights(NamedTuple):
    """Hold the parameters of a layer: weights ``[out, in]``, biases ``[out]`` or None, those of norms ``[size]``."""

    norm: Tensor
    query: Tensor
    query_bias: Tensor | None
    key: Tensor
    key_bias: Tensor | None
    value: Tensor
    value_bias: Tensor | None
    output: Tensor
    output_bias: Tensor | None
    mlp_norm: Tensor
    gate: Tensor
    gate_bias: Tensor | None
    up: Tensor
    up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None
    eps: float
    mlp_eps: float


class _Layer(Structure):
    """Mirror the struct ``DecoderLayer`` of decoder_layer.c."""

    _fields_ = [  # ctypes requires a list
        *((name, c_void_p) for name in LayerWeights._fields[:-2]),
        *((name, c_float) for name in LayerWeights._fields[-2:]),
    ]


class _Rows(Structure):
    """Mirror the struct ``DecoderRows`` of decoder_layer.c."""

    _fields_ = [  # ctypes requires a list
        *((name, c_void_p) for name in ("hidden", "normed", "products", "keys", "values", "attended", "gate", "up")),
        *((name, c_void_p) for name in ("cos", "sin", "activation")),
        *((name, c_int64) for name in ("rows", "size", "heads", "kv_heads", "dim", "inner", "lanes", "threads")),
    ]


class Sizes(NamedTuple):
    """Hold the sizes of all layers of a model. size: of a hidden row. inner: of an MLP's."""

    size: int
    heads: int
    kv_heads: int
    dim: int
    inner: int


class DecoderLayers:
    """Hold the addresses of a model's weights, checked once."""

    def __init__(self, layers: Sequence[LayerWeights], sizes: Sizes, activation: Tensor, lanes: int) -> None:
        """Take the weights of all layers. activation ``[65536]``: of each bfloat16 number, by its bits. lanes: see ``lanes_of_sums``.

        Raises ValueError for a weight that is no contiguous bfloat16 tensor of its size.
        """
        self.sizes, self._lanes = sizes, lanes
        self._tensors = [each for layer in layers for each in layer if isinstance(each, Tensor)]
        self._places = places(*self._tensors)
        self._activation = activation
        self._activation_at = address("activation", activation, _KIND, (NUMBERS,))
        self._calls = [byref(_layer(each, sizes)) for each in layers]
        self.before: Callable[..., None] = library.function("before_attention", c_void_p, c_void_p, c_void_p)
        self.after: Callable[..., None] = library.function("after_attention", c_void_p, c_void_p)

    @property
    def in_place(self) -> bool:
        """Return whether the weights lie where they were."""
        return places(*self._tensors) == self._places

    def rows(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> DecoderRows:
        """Begin a pass over the rows ``[rows, size]``, which are changed in place. cos, sin ``[rows, dim]``: their rotation."""
        return DecoderRows(self, hidden, cos, sin)


class DecoderRows:
    """Compute one pass, layer by layer."""

    def __init__(self, layers: DecoderLayers, hidden: Tensor, cos: Tensor, sin: Tensor) -> None:
        rows, sizes = hidden.shape[0], layers.sizes
        own, shared = sizes.heads * sizes.dim, sizes.kv_heads * sizes.dim
        lengths = (sizes.size, sizes.size, shared, shared, own, sizes.inner, sizes.inner)
        scratch = torch.empty(rows * sum(lengths), dtype=_KIND, device="cpu")
        self._layers, self.hidden = layers, hidden
        self._kept = (scratch, cos, sin)
        # Fresh for each layer, since policies may keep them.
        self._queries = torch.empty(len(layers._calls), rows, sizes.heads, 1, sizes.dim, dtype=_KIND, device="cpu")
        self._by_row = self._queries.flatten(0, 1).unbind()
        self._queries_at = address("queries", self._queries, _KIND, self._queries.shape)
        self._pairs = scratch[rows * 2 * sizes.size :].split(rows * shared)[:2]
        starts = [address("scratch", scratch, _KIND, scratch.shape)]
        for length in lengths:
            starts.append(starts[-1] + rows * length * 2)
        self._attended = starts[4]
        self._call = byref(
            _Rows(
                address("hidden", hidden, _KIND, (rows, sizes.size)),
                *starts[:-1],
                address("cos", cos, _KIND, (rows, sizes.dim)),
                address("sin", sin, _KIND, (rows, sizes.dim)),
                layers._activation_at,
                rows,
                *sizes,
                layers._lanes,
                library.threads(),
            )
        )
        self._row_bytes = own * 2
        self.keys, self.values = (
            each.view(rows, sizes.kv_heads, 1, sizes.dim).unbind() for each in self._pairs
        )  # of the layer under way

    def before_attention(self, layer: int) -> tuple[Tensor, ...]:
        """Return each row's rotated queries ``[Hq, 1, D]``; ``keys`` and ``values`` hold its pairs ``[Hkv, 1, D]``."""
        place = self._queries_at + layer * len(self.keys) * self._row_bytes
        self._layers.before(self._layers._calls[layer], self._call, place)
        first = layer * len(self.keys)
        return self._by_row[first : first + len(self.keys)]

    def after_attention(self, layer: int, attended: Sequence[Tensor]) -> None:
        """Go on with each row's attention output ``[Hq, 1, D]``."""
        place, sizes = self._attended, self._layers.sizes
        for each in attended:
            each = each.contiguous()
            memmove(place, address("attended", each, _KIND, (sizes.heads, 1, sizes.dim)), self._row_bytes)
            place += self._row_bytes
        self._layers.after(self._layers._calls[layer], self._call)


def _layer(weights: LayerWeights, sizes: Sizes) -> Any:
    size, own, shared, inner = sizes.size, sizes.heads * sizes.dim, sizes.kv_heads * sizes.dim, sizes.inner
    shapes: list[tuple[int, ...]] = [(size,)]
    for shape in ((own, size), (shared, size), (shared, size), (size, own)):
        shapes += [shape, shape[:1]]
    shapes.append((size,))
    for shape in ((inner, size), (inner, size), (size, inner)):
        shapes += [shape, shape[:1]]
    found = [
        optional(name, tensor, _KIND, shape)
        for name, tensor, shape in zip(weights._fields[:-2], weights[:-2], shapes, strict=True)
    ]
    return _Layer(*found, weights.eps, weights.mlp_eps)


def rms_norm(rows: Tensor, weight: Tensor, eps: float, lanes: int) -> Tensor:
    """Return Llama's norm of bfloat16 rows ``[n, size]``. lanes: see ``lanes_of_sums``."""
    output, (count, size) = torch.empty_like(rows), rows.shape
    library.function("rms_norm", *[c_void_p] * 3, *[c_int64] * 3, c_float)(
        address("rows", rows, _KIND, (count, size)),
        address("weight", weight, _KIND, (size,)),
        address("output", output, _KIND, (count, size)),
        count,
        size,
        lanes,
        eps,
    )
    return output


@cache
def lanes_of_sums() -> int | None:
    """Return how many numbers torch adds as one vector where it sums a row of float32: 4, 8 or 16; None if it sums otherwise.

    It depends on the processor and on torch's build, so it is found by trying.
    """
    source = torch.Generator().manual_seed(0)
    for lanes in (8, 16, 4):
        if all(
            _sums_alike(torch.randn(64, size, generator=source, dtype=torch.float32, device="cpu"), lanes)
            for size in (30, 100, 576, 1000, 2304, 4096)
        ):
            return lanes
    return None


def _sums_alike(rows: Tensor, lanes: int) -> bool:
    rows, (count, size) = rows.to(_KIND), rows.shape
    means = torch.empty(count, dtype=torch.float32, device="cpu")
    library.function("mean_squares", *[c_void_p] * 2, *[c_int64] * 3)(
        address("rows", rows, _KIND, (count, size)),
        address("means", means, torch.float32, (count,)),
        count,
        size,
        lanes,
    )
    return torch.equal(means, torch.stack([row.float().pow(2).mean(-1) for row in rows]))
