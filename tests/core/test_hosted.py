"""Policies over another engine's blocks choose and compute what they do over loopserve's own store."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from loopserve import ConfigError, load_stack
from loopserve.core.engine.hosted import require_hosted
from loopserve.core.engine.paged_requests import PagedRequests, PagedTurn
from loopserve.core.guard.guard import Guard
from loopserve.core.kv.buffers import Known
from loopserve.core.kv.key_summaries import KeySummaries
from loopserve.core.kv.paged import places_in_block
from loopserve.core.stack.stack import PolicyStack
from tests.core.faulty import Halving, Windowed
from tests.core.paged_host import BLOCK, DIM, ORDERS, PAIRS, SPECS, Host, Own, drawn, order, slots_of, table_of

PROMPT = 90
LOOPSERVE: dict[str, Any] = {
    "policy": "loopserve", "budget": 32, "dense_below": 1, "first_block": "last_window", "hop_window": 4, "interval": 4,
    "page_budget": 12, "page": 4, "key_bits": 2, "rescore": "codes", "recent_window": 4, "sink_tokens": 2,
}  # fmt: skip
THRESHOLD = {**LOOPSERVE, "page_budget_rule": "threshold", "scope": "all"}  # as the preset has it
LINES = {
    "policy": "loopserve",
    "min_new_tokens": 4,
    "min_total_tokens": 8,
    "local_window": 4,
    "alpha": 0.6,
    "sample_rows": 8,
}
SNAPKV = {"policy": "snapkv", "budget": 24, "window": 4}
STACKS: dict[str, dict[str, Any]] = {
    "loopserve": {"prefill": LINES, "decode": LOOPSERVE},
    "threshold": {"prefill": LINES, "decode": THRESHOLD},
    "snapkv": {"prefill": {"policy": "dense"}, "decode": SNAPKV},
    "quest": {"prefill": LINES, "decode": {"policy": "quest", "budget": 24, "page": 4}},
    "twilight": {"prefill": {"policy": "dense"}, "decode": {"policy": "twilight", "inner": SNAPKV, "page": 4}},
    "adakv": {"prefill": {"policy": "dense"}, "decode": {"policy": "adakv", "inner": SNAPKV}},  # ragged heads
    "omnikv": {"prefill": LINES, "decode": {"policy": "omnikv", "budget": 24}},
    "streaming_llm": {
        "prefill": {"policy": "dense"},
        "decode": {"policy": "streaming_llm", "budget": 24},
    },
}


def passes(tokens: int = PROMPT, outputs: int = 10) -> list[Any]:
    """A prompt in chunks of 40, then single tokens."""
    sizes = [40] * (tokens // 40) + [tokens % 40] * (tokens % 40 > 0) + [1] * outputs
    return [drawn(size, seed) for seed, size in enumerate(sizes)]


@pytest.mark.parametrize("order_of_keys", [*ORDERS, PAIRS])
@pytest.mark.parametrize("name", STACKS)
def test_the_same_pairs_and_outputs_as_over_the_own_store(name: str, order_of_keys: str) -> None:
    slots = slots_of(STACKS[name])
    host, own = Host(order_of_keys), Own(slots, PROMPT)
    turn = host.begin(slots, PROMPT)
    for given in passes():
        for layer, (found, wanted) in enumerate(zip(host.run(turn, given), own.run(given), strict=True)):
            if found is None:  # left to the host
                found = own.dense(layer, given[layer][0])
            torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    ours, theirs = turn.stats.as_dict(), own.session.stats.as_dict()
    for figure in (
        "attended_fraction",
        "prefill_cell_density",
        "compressed_share",
        "reselected_steps",
        "fallbacks",
        "faults",
    ):
        assert ours[figure] == theirs[figure], figure
    assert ours["attended_fraction"] < 0.7


@pytest.mark.parametrize("name", ["loopserve", "threshold"])
def test_decoding_under_loopserve_gathers_no_whole_store(name: str) -> None:
    host, slots = Host(), slots_of(STACKS[name])
    turn = host.begin(slots, PROMPT)
    *prompt, last = passes(outputs=1)
    for given in prompt:
        host.run(turn, given)
    before = table_of(turn).counts.copy()
    outputs = [last, *(drawn(1, seed) for seed in range(20, 30))]
    for given in outputs:
        assert None not in host.run(turn, given)
    after = table_of(turn).counts
    assert after["gathered_keys"] == before["gathered_keys"] > 0
    assert after["gathered_values"] == before["gathered_values"]
    assert after["chosen_pairs"] > before["chosen_pairs"]


def test_a_dense_stack_reads_nothing() -> None:
    host, slots = Host(), slots_of("dense")
    turn = host.begin(slots, PROMPT)
    for given in passes():
        assert host.run(turn, given) == [None, None]
    assert not table_of(turn).counts
    assert turn.stats.as_dict()["attended_fraction"] == turn.stats.as_dict()["prefill_cell_density"] == 1.0


def test_codes_of_a_cached_prefix_are_shared_and_those_of_a_reused_block_are_not() -> None:
    host, slots = Host(), slots_of(STACKS["loopserve"])
    prompt = passes(outputs=0)
    first = host.begin(slots, PROMPT)
    for given in prompt:
        host.run(first, given)
    coded = table_of(first).counts["coded_pages"]
    assert coded == PROMPT // LOOPSERVE["page"] * len(SPECS) and not table_of(first).counts["shared_pages"]
    stored = 80  # what a prefix cache would have: whole blocks
    second = host.begin(slots, PROMPT, like=first, stored=stored)
    host.run(second, drawn(PROMPT - stored, 7))
    assert table_of(second).counts["shared_pages"] == stored // LOOPSERVE["page"] * len(SPECS)
    for turn in (first, second):
        _codes_are_those_of_the_keys(turn)
    host.free += table_of(first).blocks.tolist()  # the first request ends, and another one gets its blocks
    third = host.begin(slots, PROMPT)
    for seed, given in enumerate(prompt):
        host.run(third, drawn(given[0][0].shape[1], 50 + seed))
    assert not table_of(third).counts["shared_pages"]
    _codes_are_those_of_the_keys(third)


def _codes_are_those_of_the_keys(turn: Any) -> None:
    for index, layer in enumerate(turn.session.cache.layers):
        held = turn.session.states["decode:0"].key_summaries[index]
        fresh = KeySummaries(held.page, held.bits)
        fresh.update(layer.store.keys.contiguous())
        assert torch.equal(held.low, fresh.low) and torch.equal(held.high, fresh.high)
        columns = turn.seen
        assert torch.equal(held.codes.flatten(1, 2)[:, :columns], fresh.codes.flatten(1, 2)[:, :columns])


def test_requests_of_one_batch_share_no_state() -> None:
    host, slots = Host(), slots_of(STACKS["loopserve"])
    alone, others = Host(), [host.begin(slots, PROMPT) for _ in range(3)]
    turn = alone.begin(slots, PROMPT)
    for number, given in enumerate(passes()):
        wanted = alone.run(turn, given)
        for seed, each in enumerate(others):
            found = host.run(each, given if seed == 1 else drawn(given[0][0].shape[1], 100 * seed + number))
            if seed == 1:
                for mine, expected in zip(found, wanted, strict=True):
                    assert (mine is None) == (expected is None)
                    assert mine is None or expected is None or torch.equal(mine, expected)


@pytest.mark.parametrize("name", ORDERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_order_within_a_block_is_found_by_writing(name: str, dtype: torch.dtype) -> None:
    host = Host(name)

    def write(keys: torch.Tensor, values: torch.Tensor, cache: torch.Tensor) -> None:
        host._write(cache, keys, values, list(range(BLOCK)))

    keys, values = places_in_block(write, BLOCK, DIM, dtype)
    assert torch.equal(keys, order(name)) and torch.equal(values, order("rows"))


def test_a_stack_that_evicts_is_refused_by_name() -> None:
    stack = load_stack({"prefill": {"policy": "dense"}, "decode": {**SNAPKV, "retention": "evict"}})
    with pytest.raises(ConfigError, match=r"'snapkv' evicts pairs.*set its retention to keep"):
        require_hosted(stack, SPECS)


def test_a_policy_that_has_rows_computed_again_is_refused_by_name() -> None:
    stack = load_stack({"prefill": {"policy": "dense"}, "decode": {**LOOPSERVE, "first_block": "two_hop"}})
    with pytest.raises(ConfigError, match=r"'loopserve' .* computed again"):
        require_hosted(stack, SPECS)


def _raise(*_: Any) -> Any:
    raise RuntimeError("broken on purpose")


class BrokenPrefill(Windowed):
    """Raises at every call."""

    sparsify = _raise


@pytest.mark.parametrize("method", ["sparsify", "before_attention", "after_attention", "after_forward"])
def test_a_fault_of_a_policy_leaves_the_rest_of_the_request_dense(method: str) -> None:
    prefill = BrokenPrefill() if method == "sparsify" else load_stack("dense").prefill
    decode = load_stack("dense").decode if method == "sparsify" else type("Broken", (Halving,), {method: _raise})()
    slots = require_hosted(PolicyStack("broken", prefill, decode), SPECS)
    host = Host(guard=Guard(on_fault="dense"))
    turn = host.begin(slots, PROMPT)
    found = [host.run(turn, given) for given in passes()]
    assert turn.stats.as_dict()["faults"] == 1
    assert found[-1] == [None, None]


def test_a_host_may_compute_in_inference_mode() -> None:
    host, slots = Host(), slots_of(STACKS["loopserve"])
    turn = host.begin(slots, PROMPT)
    with torch.inference_mode():
        found = [host.run(turn, given) for given in passes()]
    assert None not in found[-1]
    assert turn.stats.as_dict()["faults"] == 0


def begun(requests: PagedRequests, stored: int = 0, name: str = "a") -> PagedTurn:
    turn = requests.turn(name, stored, lambda: list(range(PROMPT)))
    assert turn is not None
    return turn


def test_a_request_is_held_while_it_goes_on_and_begins_anew_once_it_lost_its_pairs() -> None:
    requests = PagedRequests(slots_of(STACKS["loopserve"]), Guard(on_fault="dense"))
    host = Host(layers=requests.layers)
    turn = begun(requests)
    for given in passes(outputs=2):
        host.run(turn, given)
        assert begun(requests, turn.seen) is turn
    assert turn.figures["output_tokens"] == 3 and turn.figures["known_tokens"] == PROMPT
    again = begun(requests, 40)  # preempted: its first blocks were still in the prefix cache
    assert again is not turn and again.seen == 40 and not again.session.states["decode:0"].selections
    assert [each["output_tokens"] for each in requests.figures] == [3, 0]
    assert [each["cached_tokens"] for each in requests.drop(["a", "unknown"])] == [40]
    assert not requests.held


def test_a_request_whose_keys_are_no_numbers_goes_on_dense_and_the_others_as_they_were() -> None:
    requests = PagedRequests(slots_of(STACKS["snapkv"]), Guard(on_fault="dense"))
    host = Host(layers=requests.layers)
    broken, whole = begun(requests, name="broken"), begun(requests, name="whole")
    for number, given in enumerate(passes(outputs=2)):
        for turn in (broken, whole):
            if requests.held[turn.name] is None:
                assert requests.turn(turn.name, 10_000, list) is None
                continue
            factor = float("nan") if turn is broken and number == 2 else 1.0
            context, found = host.compute(turn, [(queries * factor, *pairs) for queries, *pairs in given])
            requests.end_pass(turn, context)
    assert requests.held["broken"] is None and requests.figures[0]["faults"] == 1
    assert whole.figures["output_tokens"] == 3 and whole.figures["attended_fraction"] < 0.5 and None not in found


def test_pairs_chosen_in_two_steps_running_are_read_once() -> None:
    host, slots = Host("shuffled"), slots_of("dense")
    turn = host.begin(slots, PROMPT)
    for given in passes(outputs=0):
        host.run(turn, given)
    store, table = turn.session.cache.layers[0].store, table_of(turn)
    assert store is not None
    keys, values, known = store.keys, store.values, None
    for heads in ([[1, 5, 9], [2, 3, 4]], [[1, 6, 9], [0, 3, 80]], [[0, 1, 2], [0, 3, 80]]):
        columns = torch.tensor(heads)
        found = store.gather(columns, known)
        known = Known(columns, *found)
        for part, whole in zip(found, (keys, values), strict=True):
            assert torch.equal(part, torch.stack([whole[head, row] for head, row in enumerate(columns)]))
    assert table.counts["chosen_pairs"] == 18 and table.counts["read_pairs"] == 6 + 3 + 2
