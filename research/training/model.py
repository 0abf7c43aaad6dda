"""The Llama that is trained, in plain torch; `research.training.export` writes it as `LlamaForCausalLM` weights.

Two things keep training cheap on a CPU: the last layer computes queries only at the rows that have a loss, and the
vocabulary projection is computed at those rows alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Shape:
    """Sizes of the model; the names follow transformers' LlamaConfig."""

    vocab_size: int
    hidden_size: int = 128
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 64
    intermediate_size: int = 256
    rope_theta: float = 1e5
    rms_norm_eps: float = 1e-6


@dataclass(frozen=True)
class AttentionTarget:
    """Rows whose attention in one head should point at one position each (an auxiliary loss).

    rows, columns: [batch, count] int64 indices into the sequence; a column of -1 is ignored.
    """

    layer: int
    head: int
    rows: Tensor
    columns: Tensor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding. x: [batch, heads, rows, head_dim]; cos, sin: [batch, 1, rows, head_dim]."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin


def take_rows(x: Tensor, rows: Tensor) -> Tensor:
    """x: [batch, length, width], rows: [batch, count] -> [batch, count, width]."""
    return x.gather(1, rows.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


class Layer(nn.Module):
    """One Llama layer: grouped-query attention and a gated MLP, both behind an RMSNorm."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        hidden, width = shape.hidden_size, shape.head_dim
        queries, keys = shape.num_attention_heads * width, shape.num_key_value_heads * width

        def matrix(rows: int, columns: int, scale: float = 1.0) -> nn.Parameter:
            return nn.Parameter(torch.randn(rows, columns) * scale * columns**-0.5)

        self.input_norm = nn.Parameter(torch.ones(hidden))
        self.post_norm = nn.Parameter(torch.ones(hidden))
        self.q = matrix(queries, hidden)
        self.k = matrix(keys, hidden)
        self.v = matrix(keys, hidden)
        self.o = matrix(hidden, queries, 0.1)
        self.gate = matrix(shape.intermediate_size, hidden)
        self.up = matrix(shape.intermediate_size, hidden)
        self.down = matrix(hidden, shape.intermediate_size, 0.1)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), weight, self.shape.rms_norm_eps)

    def _heads(self, x: Tensor, count: int) -> Tensor:
        return x.view(x.shape[0], x.shape[1], count, self.shape.head_dim).transpose(1, 2)

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], rows: Tensor | None, targets: list[AttentionTarget]
    ) -> tuple[Tensor, list[Tensor]]:
        """x: [batch, length, hidden]; with `rows` [batch, count] only those rows go on. Also one loss per target."""
        shape = self.shape
        cos, sin = rope
        normed = self._norm(x, self.input_norm)
        if rows is None:
            sizes = [self.q.shape[0], self.k.shape[0], self.v.shape[0]]
            q, k, v = torch.split(F.linear(normed, torch.cat((self.q, self.k, self.v))), sizes, dim=-1)
            q = rotate(self._heads(q, shape.num_attention_heads), cos, sin)
        else:
            k, v = F.linear(normed, torch.cat((self.k, self.v))).chunk(2, dim=-1)
            q = self._heads(F.linear(take_rows(normed, rows), self.q), shape.num_attention_heads)
            q = rotate(q, take_rows(cos[:, 0], rows)[:, None], take_rows(sin[:, 0], rows)[:, None])
        k = rotate(self._heads(k, shape.num_key_value_heads), cos, sin)
        v = self._heads(v, shape.num_key_value_heads)
        group = shape.num_attention_heads // shape.num_key_value_heads
        if rows is None:
            mixed = F.scaled_dot_product_attention(
                q, k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1), is_causal=True
            )
        else:
            visible = torch.arange(k.shape[2]) <= rows[:, :, None]  # [batch, count, length]
            bias = torch.zeros(visible.shape).masked_fill(~visible, float("-inf"))[:, None]
            mixed = F.scaled_dot_product_attention(
                q, k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1), attn_mask=bias
            )
        losses = [] if rows is not None else [self._attention_loss(q, k, target, group) for target in targets]
        if rows is not None:
            x = take_rows(x, rows)
        x = x + F.linear(mixed.transpose(1, 2).flatten(2), self.o)
        gate, up = F.linear(self._norm(x, self.post_norm), torch.cat((self.gate, self.up))).chunk(2, dim=-1)
        return x + F.linear(F.silu(gate) * up, self.down), losses

    @staticmethod
    def _attention_loss(q: Tensor, k: Tensor, target: AttentionTarget, group: int) -> Tensor:
        """Cross-entropy between one head's attention at the target's rows and the wanted columns."""
        query = take_rows(q[:, target.head], target.rows)
        logits = query @ k[:, target.head // group].transpose(1, 2) * q.shape[-1] ** -0.5
        hidden = torch.arange(k.shape[2]) > target.rows[:, :, None]
        logits = logits.masked_fill(hidden, float("-inf"))
        wanted = target.columns.flatten()
        total = F.cross_entropy(logits.flatten(0, 1), wanted, ignore_index=-1, reduction="sum")
        return total / (wanted >= 0).sum().clamp(min=1)


class RecallLlama(nn.Module):
    """A small Llama with tied embeddings, and look-ahead maps that exist in training only."""

    def __init__(self, shape: Shape, kinds: Tensor, lookahead: int = 6) -> None:
        """kinds: [vocab_size] int64, which kind of word each is; words of one kind start with a part in common."""
        super().__init__()
        self.shape = shape
        # A part that all words share lets a head look at a distance whatever the words are; with purely random
        # embeddings that has to be learned first, which took longer than all the rest of the first stage.
        shared = torch.randn(shape.hidden_size) + torch.randn(int(kinds.max()) + 1, shape.hidden_size)[kinds]
        self.embedding = nn.Parameter(torch.randn(shape.vocab_size, shape.hidden_size) + shared)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.num_hidden_layers))
        # Started at 0.1: embeddings of std 1 would give logits of std 11 otherwise.
        self.norm = nn.Parameter(torch.full((shape.hidden_size,), 0.1))
        # Maps 0 .. lookahead-2 predict 2 .. lookahead words ahead in the answer; the rest predict, at a place named in
        # a question, the first words of its code.
        self.lookahead = nn.Parameter(torch.randn(2 * lookahead - 1, shape.hidden_size, shape.hidden_size) * 0.01)
        frequencies = shape.rope_theta ** (-torch.arange(0, shape.head_dim, 2).float() / shape.head_dim)
        self.register_buffer("frequencies", frequencies, persistent=False)

    def rope(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """positions: [batch, length] int64 -> cos, sin, each [batch, 1, length, head_dim]."""
        frequencies = self.get_buffer("frequencies")
        angles = positions[..., None].float() * frequencies
        angles = torch.cat((angles, angles), dim=-1)[:, None]
        return angles.cos(), angles.sin()

    def forward(
        self, ids: Tensor, positions: Tensor, rows: Tensor, targets: list[AttentionTarget]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Final (normed) hidden states at `rows`, and the attention losses by `layer.head`.

        ids, positions: [batch, length] int64; rows: [batch, count] int64 -> [batch, count, hidden].
        """
        x = F.embedding(ids, self.embedding)
        rope = self.rope(positions)
        losses: dict[str, Tensor] = {}
        last = len(self.layers) - 1
        for index, layer in enumerate(self.layers):
            mine = [target for target in targets if target.layer == index]
            x, found = layer(x, rope, rows if index == last else None, mine)
            losses.update({f"{t.layer}.{t.head}": loss for t, loss in zip(mine, found, strict=False)})
        return F.rms_norm(x, (x.shape[-1],), self.norm, self.shape.rms_norm_eps), losses

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., hidden] -> [..., vocab]."""
        return F.linear(hidden, self.embedding)
