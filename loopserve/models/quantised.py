"""Hold the weights of a model's linear layers as int8 or int4, so that a decode step on a CPU reads fewer bytes.

Products of few rows go through torch's packed kernels, which read the small weights alone. Products of many rows are bound by
arithmetic, not by memory: there one layer's weights are expanded for the call.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from loopserve.core.errors import ConfigError
from loopserve.models.few_rows import FewRowsLinear

WEIGHTS = ("auto", "int8", "int4")
# Up to here torch's packed products are at least as fast as those of expanded weights (benchmarks/results/weights.jsonl).
PACKED_ROWS = 16
GROUP = 32  # inputs that share a scale and an offset in int4, as in GGUF's Q4_0 and Q4_1
_INNER_TILES = 2  # an argument of torch's int4 packing that its CPU kernel ignores
_CLIPPING = (1.0, 0.95, 0.9, 0.85, 0.8)  # shares of a group's range that are tried for the least squared error


class QuantisedLinear(torch.nn.Module):
    """Replace a linear layer. ``weight`` is the expanded matrix ``[out, in]``, made anew each time it is read."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias
        self.dtype = linear.weight.dtype

    @property
    def weight(self) -> Tensor:
        raise AssertionError("defined by each format")

    def packed(self, rows: Tensor) -> Tensor:
        """Multiply bfloat16 rows ``[n, in]`` with the packed weights."""
        raise AssertionError("defined by each format")

    def forward(self, inputs: Tensor) -> Tensor:
        """Return ``[..., out]`` for ``[..., in]``."""
        rows = inputs.reshape(-1, self.in_features)
        if len(rows) > PACKED_ROWS:
            return functional.linear(inputs, self.weight, self.bias)
        output = self.packed(rows.to(torch.bfloat16).contiguous()).to(inputs.dtype)
        if self.bias is not None:
            output = output + self.bias
        return output.reshape(*inputs.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class Int8Linear(QuantisedLinear):
    """Hold int8 weights with one scale per output."""

    quantised: Tensor  # int8 [out, in]
    scale: Tensor  # bfloat16 [out]

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__(linear)
        whole = linear.weight.detach().float()
        scale = (whole.abs().amax(dim=1) / 127).clamp(min=1e-12).to(torch.bfloat16)
        rounded = (whole / scale.float()[:, None]).round_().clamp_(-127, 127)
        self.register_buffer("quantised", rounded.to(torch.int8))
        self.register_buffer("scale", scale)

    @property
    def weight(self) -> Tensor:
        return self.rows_of(slice(None))

    def rows_of(self, index: Tensor | slice) -> Tensor:
        """Return the expanded weights of some outputs, ``[..., in]``."""
        return self.quantised[index].to(self.dtype) * self.scale[index].to(self.dtype)[..., None]

    def packed(self, rows: Tensor) -> Tensor:
        product: Tensor = torch.ops.aten._weight_int8pack_mm(rows, self.quantised, self.scale)
        return product


class Int4Linear(QuantisedLinear):
    """Hold weights of 4 bits with a scale and an offset per 32 inputs.

    torch's packing cannot be read back, so the plain nibbles are kept beside it: a byte per weight in all.
    """

    nibbles: Tensor  # uint8 [out, in / 2]
    tiles: Tensor  # torch's packing of the same
    scales: Tensor  # bfloat16 [in / 32, out, 2]: scale and offset

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__(linear)
        codes, scale, offset = _int4_codes(linear.weight.detach().float())
        self.register_buffer("nibbles", codes[:, ::2] | codes[:, 1::2] << 4)
        self.register_buffer("tiles", torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), _INNER_TILES))
        pairs = torch.stack([scale, offset], dim=-1).transpose(0, 1).contiguous()
        self.register_buffer("scales", pairs)

    @property
    def weight(self) -> Tensor:
        codes = torch.stack([self.nibbles & 15, self.nibbles >> 4], dim=-1).flatten(-2).unflatten(-1, (-1, GROUP))
        scale, offset = self.scales.transpose(0, 1).to(self.dtype).unbind(-1)
        whole: Tensor = ((codes.to(self.dtype) - 8) * scale[..., None] + offset[..., None]).flatten(-2)
        return whole

    def packed(self, rows: Tensor) -> Tensor:
        product: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, self.tiles, GROUP, self.scales)
        return product


class QuantisedEmbedding(torch.nn.Module):
    """Look tokens up in the weights of a quantised output layer that shares them."""

    def __init__(self, head: Int8Linear) -> None:
        super().__init__()
        self.head = head
        self.num_embeddings, self.embedding_dim = head.out_features, head.in_features

    @property
    def weight(self) -> Tensor:
        return self.head.weight

    def forward(self, token_ids: Tensor) -> Tensor:
        """Return ``[..., in]`` for token ids ``[...]``."""
        return self.head.rows_of(token_ids)


@dataclass(frozen=True)
class Quantised:
    """Say what was quantised. left: names of linear layers whose shape torch's kernels do not take, or take wrongly."""

    layers: int
    left: tuple[str, ...]
    weights: str
    bytes_before: int
    bytes_after: int

    @property
    def said(self) -> str:
        """One line about it."""
        size = f"{self.bytes_after / 2**20:,.0f} MiB instead of {self.bytes_before / 2**20:,.0f}"
        line = f"{self.weights} weights in {self.layers} linear layers, {size}"
        if self.left:
            line += f"; left as they are, for their shapes: {self.left[0]}"
            line += f" and {len(self.left) - 1} more" if len(self.left) > 1 else ""
        return line


def require_format(weights: str) -> None:
    """Raise ConfigError unless ``weights`` is a known format."""
    if weights not in WEIGHTS:
        raise ConfigError(f"weights: unknown format {weights!r} (known: {', '.join(WEIGHTS)})")


def quantise(model: PreTrainedModel, weights: str) -> Quantised:
    """Replace the linear layers of a model on a CPU in place. An embedding that shares the output layer's weights shares them still.

    weights: ``int8`` or ``int4``. Raises ConfigError for another device, or a torch whose kernels compute wrong
    products here.
    """
    if model.device.type != "cpu":
        raise ConfigError(
            f"weights {weights!r} are for models on a CPU, not on {model.device.type!r}; leave weights at 'auto'"
        )
    before, layers, left = _bytes(model), 0, []
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    for name, parent, attribute, linear in list(_linears(model)):
        four_bits = weights == "int4" and linear is not head  # 4 bits there cost more than in all layers together
        if not _fits(linear, four_bits):
            left.append(name)
            continue
        quantised = Int4Linear(linear) if four_bits else Int8Linear(linear)
        _require_right(quantised, name)
        setattr(parent, attribute, quantised)
        layers += 1
        if linear is head and linear.weight is getattr(embedding, "weight", None) and _is_plain(embedding):
            assert isinstance(quantised, Int8Linear)
            model.set_input_embeddings(QuantisedEmbedding(quantised))
    return Quantised(layers, tuple(left), weights, before, _bytes(model))


def _linears(model: PreTrainedModel) -> Iterator[tuple[str, torch.nn.Module, str, torch.nn.Linear]]:
    for path, parent in model.named_modules():
        for attribute, child in parent.named_children():
            if type(child) in (torch.nn.Linear, FewRowsLinear):
                yield f"{path}.{attribute}".lstrip("."), parent, attribute, child


def _is_plain(embedding: torch.nn.Module) -> bool:
    """Return whether an embedding does nothing but look rows up."""
    return type(embedding) is torch.nn.Embedding and embedding.max_norm is None


def _fits(linear: torch.nn.Linear, four_bits: bool) -> bool:
    """Return whether torch's packed kernels take a layer's shape."""
    inputs, outputs = linear.in_features, linear.out_features
    return outputs % 16 == 0 and inputs % (GROUP if four_bits else 16) == 0


def _require_right(layer: QuantisedLinear, name: str) -> None:
    """Raise ConfigError if a packed product is not that of the expanded weights: these kernels are torch's private ones."""
    rows = torch.linspace(-1, 1, 2 * layer.in_features, dtype=torch.float32, device="cpu").reshape(2, -1)
    rows = rows.to(torch.bfloat16)
    wanted = rows.float() @ layer.weight.float().T
    error = float((layer.packed(rows).float() - wanted).abs().max())
    if not error <= 0.02 * max(float(wanted.abs().max()), 1e-6):
        raise ConfigError(
            f"torch {torch.__version__} multiplies packed weights wrongly here ({name}: off by {error:.2g}); leave weights at 'auto'"
        )


def _int4_codes(whole: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes uint8 ``[out, in]`` of 0 to 15, and bfloat16 scales and offsets ``[out, in / 32]``.

    A weight is (code - 8) * scale + offset.
    """
    groups = whole.unflatten(1, (-1, GROUP))
    low, high = groups.amin(-1), groups.amax(-1)
    middle, reach = (low + high) / 2, (high - low) / 2
    least = torch.full_like(low, torch.inf)
    best = [torch.zeros_like(groups, dtype=torch.uint8), torch.zeros_like(low), torch.zeros_like(low)]
    for share in _CLIPPING:
        scale = (2 * share * reach / 15).clamp(min=1e-12).to(torch.bfloat16).float()
        offset = (middle - share * reach + 8 * scale).to(torch.bfloat16).float()
        codes = ((groups - offset[..., None]) / scale[..., None] + 8).round_().clamp_(0, 15)
        error = ((codes - 8) * scale[..., None] + offset[..., None] - groups).square_().sum(-1)
        better = error < least
        least = torch.where(better, error, least)
        best = [
            torch.where(better[..., None], codes.to(torch.uint8), best[0]),
            torch.where(better, scale, best[1]),
            torch.where(better, offset, best[2]),
        ]
    return best[0].flatten(1), best[1].to(torch.bfloat16), best[2].to(torch.bfloat16)


def _bytes(model: torch.nn.Module) -> int:
    held = {each.data_ptr(): each.numel() * each.element_size() for each in [*model.parameters(), *model.buffers()]}
    return sum(held.values())
