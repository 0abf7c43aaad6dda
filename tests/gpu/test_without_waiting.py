"""Nothing waits for the GPU: scoring, selection and attention are queued, and a decode step is captured whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from loopserve.core.kv.key_summaries import KeySummaries
from loopserve.kernels.block_sparse import block_sparse
from loopserve.kernels.decode_attention import decode_attention
from loopserve.kernels.gather_kv import gather_kv
from loopserve.kernels.line_scores import line_scores
from loopserve.kernels.select_lines import select_lines
from loopserve.kernels.token_scores import token_scores
from loopserve.kernels.top_columns import top_columns
from loopserve.kernels.vertical_slash import vertical_slash
from tests.gpu.cases import Turn, turn


@contextmanager
def no_waiting() -> Iterator[None]:
    """Any operation that waits for the device is an error inside."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def queued(call: Callable[[], object]) -> None:
    call()  # compiling and loading a kernel may wait
    with no_waiting():
        call()


def test_a_new_turn_is_queued() -> None:
    made = turn(1024, 8192)
    options = {"scaling": made.scaling}
    columns = torch.arange(8192 - 128, 8192, device="cuda")

    def read() -> object:
        scores = line_scores(made.queries[:, -128:], made.keys, columns, **options)
        weights = torch.ones(128, device="cuda")
        for cost in ("length", "tile"):
            chosen = select_lines(
                scores.probabilities,
                columns,
                1024,
                alpha=0.9,
                cost=cost,  # type: ignore[arg-type]
                row_weights=weights,
                forced_slashes=scores.slash < 0,
            )
        return vertical_slash(made.queries, made.keys, made.values, chosen.verticals, chosen.slashes, **options)

    queued(read)


def test_blocks_are_queued() -> None:
    made = turn(1024, 8192)
    blocks = torch.rand(8, 16, 128, device="cuda") < 0.2
    queued(lambda: block_sparse(made.queries, made.keys, made.values, blocks, scaling=made.scaling))


def decode_step(query: Tensor, rows: Tensor, made: Turn, active: tuple[Tensor, Tensor], first_valid: Tensor) -> Tensor:
    """Attention over the active set, and the scores that choose the next one, which is gathered."""
    keys, values, scaling = made.keys, made.values, made.scaling
    output, _ = decode_attention(query, *active, scaling=scaling, first_valid=first_valid)
    columns = torch.arange(keys.shape[1] - rows.shape[1], keys.shape[1], device="cuda")
    scores = token_scores(rows, keys, columns, scaling=scaling)
    chosen = scores.topk(active[0].shape[1], dim=1).indices
    next_keys, next_values = gather_kv(keys, values, chosen)
    active[0].copy_(next_keys)
    active[1].copy_(next_values)
    return output


def test_a_decode_step_with_re_scoring_is_captured_in_a_graph() -> None:
    made = turn(16, 16384)
    query = made.queries[:, -1:].clone()
    active = made.keys[:, -1024:].clone(), made.values[:, -1024:].clone()
    first_valid = torch.zeros(2, dtype=torch.long, device="cuda")
    before = [each.clone() for each in active]
    queued(lambda: decode_step(query, made.queries, made, active, first_valid))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = decode_step(query, made.queries, made, active, first_valid)
    for number in (1, 300):
        query.copy_(torch.randn_like(query))
        first_valid.fill_(number)  # what a head holds may change between replays
        for each, old in zip(active, before, strict=True):
            each.copy_(old)
        graph.replay()
        replayed = output.clone()
        for each, old in zip(active, before, strict=True):
            each.copy_(old)
        torch.testing.assert_close(replayed, decode_step(query, made.queries, made, active, first_valid))


def jumping_step(query: Tensor, base: Tensor, pages: KeySummaries, observed: Tensor, made: Turn, tail: int) -> Tensor:
    """What the codes point to beside the base, attended in place, and the next base by the codes' own scores."""
    columns = pages.jumps(query, base, tail, 124, made.scaling, observed)
    output, _ = decode_attention(query, made.keys, made.values, scaling=made.scaling, columns=columns, tail=tail)
    base.copy_(top_columns(observed, base.shape[1], sink_tokens=4, recent_window=64))
    return output


def test_a_decode_step_that_jumps_is_captured_in_a_graph() -> None:
    made, tail = turn(16, 16384), 16384 - 16
    query, pages = made.queries[:, -1:].clone(), KeySummaries(32, 4)
    queued(lambda: KeySummaries(32, 4).update(made.keys))
    pages.update(made.keys)
    first = torch.arange(0, 900, device="cuda").repeat(2, 1)
    base, observed = first.clone(), torch.zeros(2, tail, device="cuda")
    queued(lambda: jumping_step(query, base, pages, observed, made, tail))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = jumping_step(query, base, pages, observed, made, tail)
    for _ in range(2):
        query.copy_(torch.randn_like(query))
        found = []
        for step in (graph.replay, lambda: output.copy_(jumping_step(query, base, pages, observed, made, tail))):
            base.copy_(first)
            observed.zero_()
            step()
            found.append((output.clone(), base.clone()))
        torch.testing.assert_close(found[0][0], found[1][0])
        assert torch.equal(found[0][1], found[1][1])
