"""Under a stack vLLM answers as stock vLLM does where all is dense, and otherwise as loopserve's own engine."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from loopserve_vllm import figures
from serving import Answer, alike, answer, beside_own_engine, engine, figures_since, runner_of, serve_under, talk
from vllm import LLM

from loopserve import ConfigError, Engine, load_stack
from loopserve.bench.demo import demo_dialogues, equal_budget
from loopserve.core.kv.selection import KVSelection, Retention
from loopserve.core.policy.interfaces import AttentionInputs, DecodeCompressor, PrefillSparsifier
from loopserve.core.policy.patterns import LinePattern
from loopserve.core.policy.registry import Kind
from loopserve.core.stack.stack import PolicyStack, _as_it_comes
from loopserve.plugins import load_registry
from loopserve.policies.decode.snapkv import SnapKVDecode


class EveryLine(PrefillSparsifier):
    """Chooses every key column, so that loopserve's kernel computes all of a chunk over keys that were gathered."""

    name = "every_line"
    paper = ""

    def sparsify(self, inputs: AttentionInputs) -> LinePattern:
        columns = torch.ones(len(inputs.queries), inputs.total_tokens, dtype=torch.bool)
        return LinePattern(columns, columns.clone(), inputs.new_tokens)


class EveryPair(DecodeCompressor[None]):
    """Selects every pair in every step, so that loopserve's kernel attends to pairs that were chosen one by one."""

    name = "every_pair"
    paper = ""

    def init_state(self) -> None:
        return None

    def before_attention(self, inputs: AttentionInputs, state: None) -> KVSelection:
        last = inputs.total_tokens - 1
        return KVSelection.uniform(torch.arange(last).expand(inputs.kv_heads, -1), last, fleeting=True)


DENSE = load_stack("dense")
UNLIMITED = load_stack(
    {
        "name": "unlimited",
        "prefill": {"policy": "a_shape", "local_window": 1_000_000},
        "decode": {
            "policy": "loopserve",
            "budget": 1_000_000,
            "first_block": "last_window",
            "page_budget": 99,
            "key_bits": 2,
        },
    }
)
CHOSEN = PolicyStack("every pair chosen", EveryLine(), EveryPair())
# The largest difference of a logit. Two kernels that sum in another order, over tokens drawn at random: 3.0e-4 was measured.
WITHIN = {DENSE.name: 1e-4, UNLIMITED.name: 1e-4, CHOSEN.name: 1e-3}
SMALL = {  # acts within a few hundred tokens
    "prefill": {"policy": "loopserve", "min_new_tokens": 32, "min_total_tokens": 64, "local_window": 16},
    "decode": {
        "policy": "loopserve", "budget": 96, "dense_below": 1, "first_block": "last_window", "page_budget": 32, "page": 32,
        "key_bits": 2, "rescore": "codes", "interval": 4, "recent_window": 8,
    },
}  # fmt: skip
FEW = {
    "num_gpu_blocks_override": 44,
    "max_model_len": 1024,
}  # of 64 tokens, for eight requests that grow to 6 blocks each
PREEMPTED = {"turns": 1, "first": 280, "outputs": 48}


_alive: dict[str, LLM] = {}  # engines of single tests; see ``whole``


@pytest.fixture(scope="module")
def stock() -> dict[Any, list[list[Answer]]]:
    llm = engine()
    found: dict[Any, list[list[Answer]]] = {requests: talk(llm, requests) for requests in (1, 8)}
    found["long answers"] = talk(llm, 8, **PREEMPTED)
    assert type(runner_of(llm).model.model.layers[0].self_attn.attn.impl).__name__ == "CPUAttentionBackendImpl"
    return found


@pytest.fixture(scope="module")
def served(stock: Any) -> LLM:
    return engine("dense")


@pytest.fixture(scope="module")
def crowded(stock: Any) -> LLM:
    return engine("dense", **FEW)


@pytest.fixture(scope="module")
def whole(stock: Any) -> LLM:
    """An engine that computes a turn in one chunk, as loopserve's own does. Like the others it lives as long as the module: one
    that is freed takes the process groups of all with it.
    """
    return engine("dense", max_num_batched_tokens=2048)


@pytest.mark.parametrize("requests", [1, 8])
@pytest.mark.parametrize("stack", [DENSE, UNLIMITED, CHOSEN], ids=lambda stack: stack.name)
def test_without_a_limit_it_is_stock_vllm(served: LLM, stock: Any, stack: PolicyStack, requests: int) -> None:
    serve_under(served, stack)
    before = len(figures())
    found = talk(served, requests)
    most = alike(found, stock[requests])
    print(f"largest difference of a logit: {most:.1e}")
    assert most < WITHIN[stack.name]
    assert all(each.cached >= 256 for each in found[-1])  # the prefix cache had the history
    mine = figures_since(before)
    assert len(mine) == 4 * requests
    assert {each["attended_fraction"] for each in mine} == {each["prefill_cell_density"] for each in mine} == {1.0}
    assert not any(each["faults"] for each in mine)


@pytest.mark.parametrize("stack", [DENSE, UNLIMITED, CHOSEN], ids=lambda stack: stack.name)
def test_preemption_changes_nothing(crowded: LLM, stock: Any, stack: PolicyStack) -> None:
    serve_under(crowded, stack)
    before = len(figures())
    assert alike(talk(crowded, 8, **PREEMPTED), stock["long answers"]) < WITHIN[stack.name]
    assert len(figures_since(before)) > 8  # a request that was preempted began anew


def test_preemption_begins_a_sparse_request_anew(crowded: LLM) -> None:
    serve_under(crowded, load_stack(SMALL))
    before = len(figures())
    found = talk(crowded, 8, **PREEMPTED)
    assert all(len(each.tokens) == PREEMPTED["outputs"] for each in found[0])
    mine = figures_since(before)
    assert len(mine) > 8 and not any(each["faults"] for each in mine)


def test_bfloat16_pairs_are_read_where_vllm_puts_them(stock: Any) -> None:
    llm = _alive.setdefault("bfloat16", engine("dense", dtype="bfloat16"))
    first: list[list[dict[int, float]]] = []
    for stack in (DENSE, CHOSEN, load_stack(SMALL)):
        serve_under(llm, stack)
        before = len(figures())
        found = talk(llm, 2, turns=2)
        assert not any(each["faults"] for each in figures_since(before))
        first.append([each.logits[0] for each in found[0]])
    for one, other in zip(first[0], first[1], strict=True):
        assert all(abs(one[token] - other[token]) < 0.2 for token in one.keys() & other.keys())


def test_requests_of_one_batch_answer_as_they_do_alone(served: LLM) -> None:
    # Where requests share steps, chunks end elsewhere, and the sparsifier chooses by chunk: so the compressor alone acts.
    serve_under(served, load_stack({**SMALL, "prefill": {"policy": "dense"}}))
    together = talk(served, 4, turns=1, outputs=16)[0]
    serve_under(served, load_stack({**SMALL, "prefill": {"policy": "dense"}}))
    for each in together:
        assert alike([answer(served, [each.prompt], 16)], [[each]]) < 1e-3


def test_decoding_gathers_no_whole_store_and_a_cached_prefix_shares_its_codes(served: LLM) -> None:
    serve_under(served, load_stack(SMALL))
    first = talk(served, 1, turns=1, first=600, outputs=1)[0][0]
    before = len(figures())
    answer(served, [first.prompt + first.tokens * 40], 4)
    answer(served, [first.prompt + first.tokens * 40], 40)  # the same prefill: at most a block of it is computed
    few, many = figures_since(before)
    assert many["decode_steps"] - few["decode_steps"] == 36
    assert many["gathered_keys"] <= few["gathered_keys"] and many["gathered_values"] <= few["gathered_values"]
    assert many["chosen_pairs"] > few["chosen_pairs"]
    assert (
        few["shared_pages"] and many["shared_pages"] > 4 * 576 // 32 - 1
    )  # of four layers, each page of the cached blocks
    assert many["attended_fraction"] < 0.25


def test_the_bundled_models_answers_are_those_of_loopserves_engine(whole: LLM) -> None:
    tokens, turns = 1500, 3
    preset = load_stack("loopserve").describe()
    preset["prefill"]["min_total_tokens"] = (
        256  # these conversations are shorter than those that the preset reads sparse
    )
    stack = equal_budget(load_stack(preset), tokens, turns)
    serve_under(whole, stack)
    dialogues = [[turn.text for turn in each.turns] for each in demo_dialogues(0, tokens, turns, 2)]
    same, pairs = beside_own_engine(whole, Engine.from_pretrained("demo", stack, dtype="float32"), dialogues, 96)
    assert all(same)
    for number, (mine, theirs) in enumerate(pairs):
        # How many pairs reach the preset's threshold depends on sums in another order.
        assert mine["attended_fraction"] == pytest.approx(theirs["attended_fraction"], abs=5e-3)
        # Later turns begin at a block's start, up to 64 tokens before the engine's: other rows, and so other lines.
        within = 0.15 if number % turns else 1e-6
        assert mine["prefill_cell_density"] == pytest.approx(theirs["prefill_cell_density"], abs=within)
    assert sum(mine["attended_fraction"] for mine, _ in pairs) / len(pairs) < 0.2


def _policies() -> list[Any]:
    registry = load_registry().registry
    return [pytest.param(each, id=f"{each.kind}-{each.name}") for each in registry]


NOT_SERVED = {  # refused by name, for what vLLM gives no policy
    "kvzip": "computed again",
    "criticalkv": "output_weight",
    "expected_attention": "rotary",
}


@pytest.mark.parametrize("policy", _policies())
def test_every_policy_serves_three_turns_or_is_refused_by_name(served: LLM, policy: Any) -> None:
    from loopserve.bench.budget import with_budget

    made = _as_it_comes(policy, load_registry().registry)
    if policy.name == "loopserve" and policy.kind is Kind.DECODE:  # as it comes it has rows computed again
        made = load_stack("loopserve").decode
    if isinstance(made, str):
        pytest.skip(made)
    parts = (made, DENSE.decode) if policy.kind is Kind.PREFILL else (DENSE.prefill, made)
    stack = load_stack(PolicyStack(policy.name, *parts))
    if policy.kind is Kind.DECODE:
        assert isinstance(made, DecodeCompressor) and made.retention is Retention.KEEP
        stack = with_budget(stack, 96)
    if policy.name in NOT_SERVED:
        with pytest.raises(ConfigError, match=NOT_SERVED[policy.name]):
            serve_under(served, stack)
        return
    serve_under(served, stack)
    before = len(figures())
    found = talk(served, 1, turns=3, outputs=6)
    assert [len(turn[0].tokens) for turn in found] == [6, 6, 6]
    assert not any(each["faults"] for each in figures_since(before))


class Broken(SnapKVDecode):
    """SnapKV that fails for prompts of an odd number of tokens."""

    name = "broken"
    paper = ""

    def score(self, inputs: Any) -> Any:
        if inputs.total_tokens % 2:
            raise RuntimeError("broken on purpose")
        return super().score(inputs)


def test_a_fault_costs_its_own_request_no_more_than_its_saving(served: LLM) -> None:
    broken = PolicyStack("broken", DENSE.prefill, Broken(Broken.Config(budget=64, window=16)))
    serve_under(served, DENSE)
    wanted = talk(served, 2, turns=1)[0]  # of 300 and 307 tokens
    serve_under(served, broken)
    before = len(figures())
    found = talk(served, 2, turns=1)[0]
    assert found[1].tokens == wanted[1].tokens and alike([found[1:]], [wanted[1:]]) < 1e-4
    faults = [each["faults"] for each in figures_since(before)]
    assert faults == [0, 1]
