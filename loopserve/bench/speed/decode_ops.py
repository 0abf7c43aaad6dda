"""Define the operations of decode steps: attention to an active set, scoring, gathering, and all of them per step."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from loopserve.bench.heads import Heads, structured_heads
from loopserve.bench.speed.parity import DTYPES, Candidate, Case, Verdict, exact_dense, relative, verdict
from loopserve.bench.speed.suite import KernelDecode
from loopserve.kernels import backend
from loopserve.kernels.decode_attention import decode_attention
from loopserve.kernels.gather_kv import gather_kv
from loopserve.kernels.token_scores import token_scores
from loopserve.kernels.top_columns import top_columns

_SINKS, _RECENT = 4, 8


def decode_case(part: KernelDecode, device: str) -> Case:
    """Return the candidates of one case; every axis of ``part`` holds a single number. Baselines attend to all sessions at once."""
    assert isinstance(part.tokens, int) and isinstance(part.kv_heads, int) and isinstance(part.head_dim, int)
    assert isinstance(part.batch, int)
    interval = min(part.interval, part.tokens)
    made = [
        structured_heads(part.query_heads, part.kv_heads, interval, part.tokens, part.head_dim, seed, device)
        for seed in range(part.batch)
    ]
    candidates, own = [], {}
    for dtype in (DTYPES[name] for name in part.dtypes):
        steps = _Steps([each.to(dtype) for each in made], min(part.budget, part.tokens))
        own[dtype] = steps.dense()
        candidates += [getattr(steps, op)() for op in part.ops]
    queries, keys, values = (torch.cat(each) for each in zip(*(heads.tensors for heads in made), strict=True))
    return Case(
        shape={
            "q_heads": part.query_heads,
            "kv_heads": part.kv_heads,
            "m": 1,
            "n": part.tokens,
            "head_dim": part.head_dim,
            "batch": part.batch,
            "budget": min(part.budget, part.tokens),
            "interval": interval,
        },
        data=made[0].data if part.batch == 1 else f"structured, seeds 0 to {part.batch - 1}",
        candidates=candidates,
        dense=Heads(queries[:, -1:], keys, values, made[0].data),
        dense_scale=1.0,
        own_dense=own,
        fields={},
    )


class _Steps:
    """Hold one case in one dtype: the interval's queries ``[Hq, n_d, D]`` of each session at the end of its store."""

    def __init__(self, sessions: list[Heads], budget: int) -> None:
        self.sessions, self.budget = sessions, budget
        self.dtype = sessions[0].queries.dtype
        self.interval = sessions[0].queries.shape[1]
        total = sessions[0].keys.shape[1]
        self.columns = torch.arange(total - self.interval, total, device=sessions[0].keys.device)
        self.chosen = cache(lambda: [self._choose(each) for each in self.sessions])
        self.active = cache(
            lambda: [gather_kv(s.keys, s.values, at) for s, at in zip(self.sessions, self.chosen(), strict=True)]
        )

    def _scores(self, heads: Heads) -> Tensor:
        return token_scores(heads.queries, heads.keys, self.columns, scaling=heads.scaling)

    def _choose(self, heads: Heads) -> Tensor:
        return top_columns(self._scores(heads), self.budget, sink_tokens=_SINKS, recent_window=_RECENT)

    def _attend(self, active: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
        return [
            decode_attention(s.queries[:, -1:], keys, values, scaling=s.scaling)[0]
            for s, (keys, values) in zip(self.sessions, active, strict=True)
        ]

    def dense(self) -> Candidate:
        """Run our dense decode attention over the whole store, by the fastest implementation."""

        def check(found: list[Tensor]) -> Verdict:
            stretch = [(self.interval - 1, self.interval)]
            exact = torch.cat([exact_dense(each, stretch) for each in self.sessions])
            return verdict(torch.cat(found), exact, exact, self.dtype)

        whole = [(each.keys, each.values) for each in self.sessions]

        def run() -> list[Tensor]:
            with backend.use("auto"):
                return self._attend(whole)

        return Candidate("decode_attention", self.dtype, run, check, ("decode_attention",))

    def decode_attention(self) -> Candidate:
        return Candidate(
            "decode_attention",
            self.dtype,
            lambda: self._attend(self.active()),
            self._judge,
            ("decode_attention",),
            lambda _: self._described(),
        )

    def _judge(self, found: list[Tensor]) -> Verdict:
        """Compare with the reference over the same active set, and with dense attention over the store."""
        exact, dense = [], []
        for heads, at in zip(self.sessions, self.chosen(), strict=True):
            with backend.use("reference"):
                keys, values = gather_kv(heads.keys.double(), heads.values.double(), at)
                query = heads.queries[:, -1:].double()
                exact.append(decode_attention(query, keys, values, scaling=heads.scaling)[0])
            dense.append(exact_dense(heads, [(self.interval - 1, self.interval)]))
        return verdict(torch.cat(found), torch.cat(exact), torch.cat(dense), self.dtype)

    def _described(self) -> dict[str, Any]:
        return {"cell_density": self.budget / self.sessions[0].keys.shape[1]}

    def token_scores(self) -> Candidate:
        def check(found: list[Tensor]) -> Verdict:
            with backend.use("reference"):
                exact = [
                    token_scores(each.queries.double(), each.keys.double(), self.columns, scaling=each.scaling)
                    for each in self.sessions
                ]
            return verdict(torch.cat(found), torch.cat(exact), None, self.dtype)

        return Candidate(
            "token_scores",
            self.dtype,
            lambda: [self._scores(each) for each in self.sessions],
            check,
            ("token_scores",),
            fields={"rows": self.interval},
        )

    def gather_kv(self) -> Candidate:
        def run() -> list[tuple[Tensor, Tensor]]:
            return [gather_kv(s.keys, s.values, at) for s, at in zip(self.sessions, self.chosen(), strict=True)]

        def check(found: list[tuple[Tensor, Tensor]]) -> Verdict:
            with backend.use("reference"):
                exact = run()
            pairs = [
                (a, b) for ours, theirs in zip(found, exact, strict=True) for a, b in zip(ours, theirs, strict=True)
            ]
            ok = all(torch.equal(a, b) for a, b in pairs)
            error = max(relative(a, b) for a, b in pairs)
            return Verdict(error, error, None, ok, "" if ok else "copies differ from the pairs chosen")

        return Candidate("gather_kv", self.dtype, run, check, ("gather_kv",), lambda _: self._described())

    def sparse_decode(self) -> Candidate:
        """Run one interval, counted per step: n_d times attention, and once scoring, top B and gathering."""

        def run() -> list[Tensor]:
            found: list[Tensor] = []
            for _ in range(self.interval):
                found = self._attend(self.active())
            for each in self.sessions:
                gather_kv(each.keys, each.values, self._choose(each))
            return found

        return Candidate(
            "sparse_decode",
            self.dtype,
            run,
            self._judge,
            ("token_scores", "gather_kv", "decode_attention"),
            lambda _: self._described(),
            scale=1.0 / self.interval,
        )
