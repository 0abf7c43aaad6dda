"""Random attention inputs for the kernels' tests; hypothesis draws the shapes, a seed the numbers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from loopserve.kernels.native import library

FAST = ("torch", "cpu") if library.unavailable() is None else ("torch",)
IMPLEMENTATIONS = ("reference", *FAST)


@dataclass(frozen=True)
class Case:
    queries: Tensor  # [Hq, Tq, D]
    keys: Tensor  # [Hkv, Tk, D], a view into a larger buffer filled with NaN beyond its end
    values: Tensor
    first_valid: Tensor | None
    softcap: float | None
    generator: torch.Generator

    @property
    def scaling(self) -> float:
        return self.queries.shape[2] ** -0.5

    @property
    def options(self) -> dict[str, object]:
        return {"scaling": self.scaling, "softcap": self.softcap, "first_valid": self.first_valid}

    def bools(self, *shape: int, share: float = 0.2) -> Tensor:
        return torch.rand(*shape, generator=self.generator) < share


def make(
    rows: int,
    total: int,
    *,
    group: int = 2,
    kv_heads: int = 2,
    dim: int = 8,
    seed: int = 0,
    filler: bool = False,
    softcap: float | None = None,
) -> Case:
    """Normal numbers; whatever must not be read (memory behind the last column, filler columns) is NaN."""
    generator = torch.Generator().manual_seed(seed)

    def buffer() -> Tensor:
        whole = torch.full((kv_heads, total + 5, dim), float("nan"))
        whole[:, :total] = torch.randn(kv_heads, total, dim, generator=generator) * 2
        return whole[:, :total]

    queries = torch.randn(kv_heads * group, rows, dim, generator=generator) * 2
    keys, values = buffer(), buffer()
    first_valid = None
    if filler:
        first_valid = torch.randint(0, total - rows + 1, (kv_heads,), generator=generator)
        for head, start in enumerate(first_valid.tolist()):
            keys[head, :start] = values[head, :start] = float("nan")
    return Case(queries, keys, values, first_valid, softcap, generator)


@st.composite
def cases(draw: st.DrawFn, most: int = 260) -> Case:
    total = draw(st.one_of(st.sampled_from([1, 2, 63, 64, 65, 111, 257]), st.integers(1, most)))
    rows = draw(st.one_of(st.just(1), st.just(total), st.integers(1, total)))
    return make(
        rows,
        total,
        group=draw(st.sampled_from([1, 2, 4, 7])),
        kv_heads=draw(st.sampled_from([1, 2])),
        dim=draw(st.sampled_from([4, 16, 64])),
        seed=draw(st.integers(0, 1000)),
        filler=draw(st.booleans()),
        softcap=draw(st.sampled_from([None, 5.0])),
    )
