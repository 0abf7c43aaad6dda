"""Requests of one batch over another engine's blocks: what policies attend to and what is left to the engine, in one output."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from loopserve.core.engine.attention import LayerCall
from loopserve.core.engine.paged_requests import PagedRequests, Row, summary
from loopserve.core.guard.guard import Guard
from tests.core.paged_host import BLOCK, DIM, HEADS, LAYERS, Host, Own, drawn, slots_of
from tests.core.test_hosted import STACKS

SIZES = {"long": [40, 40, 10, 1, 1, 1], "short": [8, 8, 4, 1, 1, 1]}  # tokens per pass; the second fits the budget
NAMES = list(SIZES)
PROMPTS = [90, 20]


def test_a_batch_is_filled_by_the_policies_and_by_the_host() -> None:
    slots = slots_of(STACKS["snapkv"])
    requests = PagedRequests(slots, Guard(on_fault="dense"))
    host, owns = Host(layers=requests.layers), [Own(slots, tokens) for tokens in PROMPTS]
    table = torch.tensor(host.free[:32], dtype=torch.int32).view(2, 16)
    lengths, sparse_rows = [0, 0], []
    for number, sizes in enumerate(zip(*SIZES.values(), strict=True)):
        given = [drawn(size, 10 * number + each) for each, size in enumerate(sizes)]
        wanted = [own.run(each) for own, each in zip(owns, given, strict=True)]
        places = [torch.arange(start, start + size) for start, size in zip(lengths, sizes, strict=True)]
        slot = torch.cat([row[at // BLOCK].long() * BLOCK + at % BLOCK for row, at in zip(table, places, strict=True)])
        lengths = [length + size for length, size in zip(lengths, sizes, strict=True)]
        with requests.running():
            assert PagedRequests.current is requests and not requests.rows
            requests.begin(NAMES, [0, sizes[0], sum(sizes)], lengths, table, BLOCK, _known)
            for layer in range(LAYERS):
                queries, keys, values = (
                    torch.cat([each[layer][part].transpose(0, 1) for each in given]) for part in range(3)
                )
                host._bind(layer)
                host._write(host.caches[layer], keys, values, slot.tolist())
                requests.layers[layer].written(slot)
                sparse = requests.attend(LayerCall(layer, DIM**-0.5), queries, keys, values)
                sparse_rows += sparse
                output = torch.full((sum(sizes), HEADS, DIM), float("nan"))

                def dense(rows: list[Row], queries: Tensor, found: Tensor, layer: int = layer) -> None:
                    parts = queries.split([row.length for row in rows]), found.split([row.length for row in rows])
                    for row, part, own in zip(rows, *parts, strict=True):
                        own.copy_(owns[row.number].dense(layer, part.transpose(0, 1)).transpose(0, 1))

                requests.fill(output, queries, sparse, dense)
                expected = torch.cat([each[layer].transpose(0, 1) for each in wanted])
                torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)
        assert PagedRequests.current is None
    assert set(sparse_rows) == {0}  # the short one has no selection
    said = [summary(each) for each in requests.drop(NAMES)]
    assert said[1] == ("20 tokens, 0 of them cached; 4 outputs; prefill density 1.0, attended fraction 1.0, 0 faults")


def _known(name: str) -> range:
    return range(PROMPTS[NAMES.index(name)])


def test_a_pass_in_which_the_host_fails_ends_its_turns() -> None:
    requests = PagedRequests(slots_of("dense"), Guard(on_fault="dense"))

    def failing() -> None:
        with requests.running():
            requests.begin(NAMES, [0, 90, 110], PROMPTS, torch.zeros(2, 16, dtype=torch.int32), BLOCK, _known)
            raise RuntimeError("the host failed")

    with pytest.raises(RuntimeError, match="host"):
        failing()
    assert PagedRequests.current is None
    assert not requests.held and len(requests.figures) == 2  # the next pass begins them anew
