"""Muon (Jordan et al., 2024, https://kellerjordan.github.io/posts/muon): momentum, orthogonalised, for matrices.

The matrices here are tiny, so all of one shape are orthogonalised in one batched call.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn


def orthogonalise(g: Tensor, steps: int = 5) -> Tensor:
    """Newton-Schulz iteration towards semi-orthogonal matrices. g: [count, rows, columns], rows <= columns."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x: Tensor = g / (g.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram: Tensor = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum whose step is orthogonalised; accepts matrices and stacks of matrices."""

    def __init__(self, params: Iterable[nn.Parameter], lr: float = 0.01, momentum: float = 0.95) -> None:
        super().__init__(list(params), {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            stacks: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is None:
                    continue
                buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                buffer.lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(buffer, group["momentum"])
                flat, target = update.flatten(0, -3) if p.dim() == 3 else update[None], p if p.dim() == 3 else p[None]
                if flat.shape[1] > flat.shape[2]:
                    flat = flat.mT
                for matrix, place in zip(flat, target, strict=True):
                    stacks[tuple(flat.shape[1:])].append((matrix, place))
            for pairs in stacks.values():
                steps = orthogonalise(torch.stack([matrix for matrix, _ in pairs]))
                for step, (_, place) in zip(steps, pairs, strict=True):
                    rows, columns = place.shape
                    scale = max(1.0, rows / columns) ** 0.5
                    place.add_(step if step.shape == place.shape else step.mT, alpha=-group["lr"] * scale)
