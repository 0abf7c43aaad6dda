"""Define scorers with kvpress's interface, from the formulas of the papers, for tests without kvpress."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d, pad


def queries_of(module: Any, hidden_states: Tensor) -> Tensor:
    shape = (1, hidden_states.shape[1], module.config.num_attention_heads, module.head_dim)
    queries: Tensor = module.q_proj(hidden_states).view(shape).transpose(1, 2)
    return queries


def turned(queries: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = queries.shape[-1] // 2
    halves = torch.cat([-queries[..., half:], queries[..., :half]], dim=-1)
    return queries * cos.unsqueeze(1) + halves * sin.unsqueeze(1)


@dataclass
class WindowScorer:
    """Score as SnapKV: pooled attention of the last rows, which are kept themselves."""

    compression_ratio: float = 0.0
    window_size: int = 16
    kernel_size: int = 5

    def score(self, module: Any, hidden_states: Any, keys: Any, values: Any, attentions: Any, kwargs: Any) -> Tensor:
        window, total = self.window_size, keys.shape[2]
        assert total > window, f"{total} pairs are not more than the window of {window}"
        cos, sin = kwargs["position_embeddings"]
        queries = turned(queries_of(module, hidden_states[:, -window:]), cos[:, -window:], sin[:, -window:])
        repeated = keys.repeat_interleave(module.num_key_value_groups, 1)
        scores = queries @ repeated.mT / math.sqrt(module.head_dim)
        later = torch.ones_like(scores, dtype=torch.bool).triu(total - window + 1)
        mass = scores.masked_fill(later, float("-inf")).softmax(-1)[..., :-window].mean(2)
        mass = avg_pool1d(mass, self.kernel_size, stride=1, padding=self.kernel_size // 2)
        mass = mass.view(1, keys.shape[1], -1, total - window).mean(2)
        return pad(mass, (0, window), value=mass.max().item() + 1)


@dataclass
class ExpectedScorer:
    """Score by expected attention of the mean query, rotated to future positions."""

    n_future: int = 64
    n_sink: int = 2

    def score(self, module: Any, hidden_states: Any, keys: Any, values: Any, attentions: Any, kwargs: Any) -> Tensor:
        mean = queries_of(module, hidden_states[:, self.n_sink :]).mean(2, keepdim=True)
        ahead = torch.arange(hidden_states.shape[1], hidden_states.shape[1] + self.n_future)
        cos, sin = module.rotary_emb(mean, ahead[None])
        mean = turned(mean.expand(-1, -1, self.n_future, -1), cos, sin).mean(2, keepdim=True)
        ranked = keys[:, :, self.n_sink :].repeat_interleave(module.num_key_value_groups, 1)
        mass = (mean @ ranked.mT / math.sqrt(module.head_dim)).softmax(-1)
        mass = mass.view(1, keys.shape[1], -1, ranked.shape[2]).mean(2)
        return pad(mass, (self.n_sink, 0), value=mass.max().item() + 1)


@dataclass
class KeyLengthScorer:
    """Score as Knorm, by keys only."""

    def score(self, module: Any, hidden_states: Any, keys: Any, values: Any, attentions: Any, kwargs: Any) -> Tensor:
        length: Tensor = -keys.norm(dim=-1)
        return length


@dataclass
class ObservedScorer:
    """Score by the mean attention of each pair over the rows that see it."""

    def score(self, module: Any, hidden_states: Any, keys: Any, values: Any, attentions: Any, kwargs: Any) -> Tensor:
        total = keys.shape[2]
        mass: Tensor = attentions.sum(2) / torch.arange(total, 0, -1)
        return mass.view(1, keys.shape[1], -1, total).mean(2)


@dataclass
class RatioScorer:
    """Score as StreamingLLM: zeros for pairs that the ratio removes."""

    compression_ratio: float = 0.0
    n_sink: int = 2

    def score(self, module: Any, hidden_states: Any, keys: Any, values: Any, attentions: Any, kwargs: Any) -> Tensor:
        total = keys.shape[2]
        scores = torch.ones(1, keys.shape[1], total, dtype=torch.float32)
        scores[..., self.n_sink : self.n_sink + total - int(total * (1 - self.compression_ratio))] = 0
        return scores


class Careless(KeyLengthScorer):
    """Write into the inputs."""

    def score(self, module: Any, hidden_states: Any, keys: Any, values: Any, attentions: Any, kwargs: Any) -> Tensor:
        keys.mul_(0)
        values.mul_(0)
        return super().score(module, hidden_states, keys, values, attentions, kwargs)


class Curious(KeyLengthScorer):
    """Read the keys before rotation from hidden states, which are not available."""

    def score(self, module: Any, hidden_states: Any, keys: Any, values: Any, attentions: Any, kwargs: Any) -> Tensor:
        length: Tensor = module.k_proj(hidden_states).norm(dim=-1)
        return length


class Unbatched(KeyLengthScorer):
    """Return scores without the batch dimension."""

    def score(self, module: Any, hidden_states: Any, keys: Any, values: Any, attentions: Any, kwargs: Any) -> Tensor:
        return super().score(module, hidden_states, keys, values, attentions, kwargs)[0]


class NoScorer:
    """Define no score."""
