"""Agreement with dense is exact where nothing is left out, and a replayed prefill is the same as a computed one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from loopserve.api import load_stack
from loopserve.core.stack.stack import PolicyStack
from loopserve.models.bridge import IMPLEMENTATION, TransformersModel
from loopserve.models.layers import set_implementation
from loopserve.models.tiny import VOCABULARY, tiny_model
from research.evidence.units import Row, Unit
from research.evidence_real.case import Case
from research.evidence_real.comparison import BLOCK
from research.evidence_real.ledger import Ledger
from research.evidence_real.stacks import at_share, with_options
from research.evidence_real.summary import Agreement, standard_error
from research.evidence_real.texts import KINDS, TEXTS, text

DENSE = {"policy": "dense"}


def case_of(family: str, tokens: int = 200, forced: int = 2 * BLOCK + 4) -> Case:
    model = tiny_model(family)
    set_implementation(model, IMPLEMENTATION)
    draw = torch.Generator().manual_seed(3)
    ids = torch.randint(3, VOCABULARY, (tokens + forced,), generator=draw).tolist()
    return Case(TransformersModel(model), ids[:tokens], ids[tokens:])


@pytest.fixture(scope="module")
def case() -> Case:
    return case_of("llama")


def decode_only(name: str, **options: object) -> PolicyStack:
    described = load_stack(name).describe() | {"prefill": DENSE}
    described["decode"] |= options
    return load_stack(described)


STACKS = {
    "loopserve": {"budget": 48, "page_budget": 20, "dense_below": 1},
    "snapkv": {"budget": 48},
    "h2o": {"budget": 48},
    "tova": {"budget": 48},
}


def test_full_decoding_agrees_with_dense_in_every_token(case: Case) -> None:
    [(_, found)] = case.decoding({"dense": load_stack("dense")})
    assert found["tokens"] == len(case.forced) - 1
    assert Agreement([found]).same == 1.0
    assert Agreement([found]).kl < 1e-6
    assert Agreement([found]).bytes == 1.0


@pytest.mark.parametrize("name", STACKS)
def test_a_replayed_prefill_leads_to_what_a_computed_one_does(case: Case, name: str) -> None:
    stack = decode_only(name, **STACKS[name])
    [(_, replayed)] = case.decoding({name: stack})
    [(_, computed)] = case.whole({name: stack})
    assert replayed["kl"] == pytest.approx(computed["kl"], abs=1e-4)
    assert replayed["costs"] == computed["costs"]
    assert Agreement([replayed]).kl > 1e-5


def test_two_hops_are_observed_on_the_model_after_a_replay(case: Case) -> None:
    stack = decode_only("loopserve", **STACKS["loopserve"], first_block="two_hop")
    [(_, replayed)] = case.decoding({"two hops": stack})
    [(_, computed)] = case.whole({"two hops": stack})
    assert replayed["kl"] == pytest.approx(computed["kl"], abs=1e-4)


def test_stacks_in_one_pass_get_what_each_gets_alone(case: Case) -> None:
    stacks = {name: decode_only(name, **options) for name, options in STACKS.items()}
    together = dict(case.decoding(stacks))
    for name, stack in stacks.items():
        [(_, alone)] = case.decoding({name: stack})
        assert together[name]["kl"] == pytest.approx(alone["kl"], abs=1e-4)
        assert together[name]["costs"] == alone["costs"]


def test_layers_that_no_policy_serves_are_replayed_too() -> None:
    sliding = case_of("gemma3_text")
    [(_, found)] = sliding.decoding({"dense": load_stack("dense")})
    assert Agreement([found]).kl < 1e-6


def test_sparse_prefill_is_compared_after_dense_reading(case: Case) -> None:
    dense = case.prefilling(load_stack("dense"))
    assert Agreement([dense]).kl < 1e-6
    assert dense["prefill"]["cells"] == 1.0
    sparse = case.prefilling(
        load_stack(
            {"prefill": {"policy": "a_shape", "sink_tokens": 4, "local_window": 32}, "decode": {"policy": "full"}}
        ),
        realised=True,
    )
    assert Agreement([sparse]).kl > 1e-5
    assert 0 < sparse["prefill"]["cells"] < 1
    assert 0 < sparse["prefill"]["realised"] < 1


def test_a_stack_that_is_not_dense_in_prefill_is_not_replayed(case: Case) -> None:
    with pytest.raises(ValueError, match="only a dense prefill"):
        list(case.decoding({"loopserve": load_stack("loopserve")}))


def test_a_share_is_met_with_the_outputs(case: Case) -> None:
    stack = at_share(decode_only("streaming_llm"), 0.3, 200, len(case.forced))
    [(_, found)] = case.decoding({"streaming_llm": stack})
    attended = Agreement([found]).attended
    assert attended is not None
    assert abs(attended - 0.3) < 0.02


def test_bytes_beside_a_bfloat16_store_count_codes_in_full(case: Case) -> None:
    [(_, found)] = case.decoding({"loopserve": decode_only("loopserve", **STACKS["loopserve"])})
    costs, read = found["costs"], found["costs"]["read"]
    page = 64
    columns = [200 + step for step in range(1, len(case.forced))]
    held = [2 * (2 * -(-each // page) * 16 * 2 + each * 16 * 2 // 8) for each in columns]  # two KV heads of 16 channels
    halved = read["attended"] / 2 + 3 * sum(held) + sum(value for kind, value in read.items() if kind == "scoring") / 2
    assert costs["halved"] == pytest.approx(halved, rel=0.1)
    assert Agreement([found]).bytes_bf16 > Agreement([found]).bytes  # type: ignore[operator]


def test_options_of_the_command_line_reach_the_policies() -> None:
    stack = with_options("loopserve:key_bits=4,page=32,prefill.alpha=0.9").describe()
    assert (stack["decode"]["key_bits"], stack["decode"]["page"], stack["prefill"]["alpha"]) == (4, 32, 0.9)


def test_errors_are_those_of_blocks() -> None:
    flat = {"tokens": 3 * BLOCK, "kl": [BLOCK * 0.5] * 3, "same": [8, 8, 8], "loss": [0.0] * 3}
    assert Agreement([flat]).kl == 0.5
    assert standard_error([flat], "kl") == 0.0
    uneven = flat | {"kl": [0.0, BLOCK * 1.0, BLOCK * 0.5]}
    assert standard_error([uneven], "kl") == pytest.approx((0.25 / 3) ** 0.5)


@pytest.mark.parametrize("kind", KINDS)
def test_texts_are_long_enough_for_the_longest_prompt(kind: str) -> None:
    assert all(len(text(kind, number)) > 35_000 for number in range(len(TEXTS[kind])))


def row(unit: Unit) -> Row:
    return {"experiment": unit.experiment, "unit": unit.spec, "found": {}, "seconds": 1.0, "made": {}}


def test_a_ledger_keeps_what_is_done_and_drops_what_is_planned_no_more(tmp_path: Path) -> None:
    units = [Unit("decode", {"kind": "decode", "number": number}) for number in range(3)]
    ledger = Ledger(tmp_path)
    ledger.add(row(units[2]))
    ledger.add(row(units[0]))
    assert Ledger(tmp_path).waiting(units) == [units[1]]
    ledger.tidy(units)
    assert [each["unit"]["number"] for each in ledger.rows("decode")] == [0, 2]
    ledger.tidy(units[1:])
    assert [each["unit"]["number"] for each in ledger.rows("decode")] == [2]
